"""Data for a loop: which answers to keep, new questions, mixtures. Functions of strings; no model inside."""

from ..answers import final_answer as final_answer
from ..answers import is_correct as is_correct
from ..answers import same_answer as same_answer
from .filtering import Kept as Kept
from .filtering import Sample as Sample
from .filtering import keep_correct as keep_correct
from .mixture import accumulate as accumulate
from .mixture import mix as mix
