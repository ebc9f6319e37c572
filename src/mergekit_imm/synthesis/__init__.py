"""Data for a loop: select answers, make new questions, mix rounds. Functions of strings, without a model."""

from ..evaluation.answers import final_answer as final_answer
from ..evaluation.answers import is_correct as is_correct
from ..evaluation.answers import same_answer as same_answer
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
from .filtering import Kept as Kept
from .filtering import Sample as Sample
from .filtering import keep_correct as keep_correct
from .mixture import accumulate as accumulate
from .mixture import mix as mix
