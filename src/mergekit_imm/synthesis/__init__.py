"""Data for a loop: which answers to keep, new questions, mixtures. Functions of strings; no model inside."""

from .crescent import Consensus as Consensus
from .crescent import Crescent as Crescent
from .crescent import Pair as Pair
from .crescent import bait_prompts as bait_prompts
from .crescent import clean_question as clean_question
from .crescent import consensus as consensus
from .crescent import crescent as crescent
from .deduplication import Deduplicated as Deduplicated
from .deduplication import Discarded as Discarded
from .deduplication import deduplicate as deduplicate
