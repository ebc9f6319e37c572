"""Data for a loop: select answers, make new questions, mix rounds. Functions of strings, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evaluation.answers import is_correct as is_correct
    from ..evaluation.answers import same_answer as same_answer
    from ..evaluation.extraction import final_answer as final_answer
    from .crescent_method import Consensus as Consensus
    from .crescent_method import Crescent as Crescent
    from .crescent_method import Pair as Pair
    from .crescent_method import bait_prompts as bait_prompts
    from .crescent_method import clean_question as clean_question
    from .crescent_method import consensus as consensus
    from .crescent_method import crescent as crescent
    from .deduplication import Deduplicated as Deduplicated
    from .deduplication import Discarded as Discarded
    from .deduplication import deduplicate as deduplicate
    from .filtering import Kept as Kept
    from .filtering import Sample as Sample
    from .filtering import keep_correct as keep_correct
    from .mixture import accumulate as accumulate
    from .mixture import mix as mix
else:
    from ..common.lazy import lazy

    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "..evaluation.answers": "is_correct same_answer",
            "..evaluation.extraction": "final_answer",
            ".crescent_method": "Consensus Crescent Pair bait_prompts clean_question consensus crescent",
            ".deduplication": "Deduplicated Discarded deduplicate",
            ".filtering": "Kept Sample keep_correct",
            ".mixture": "accumulate mix",
        },
    )
