"""Was the improvement real? Measures on samples of models before and after self-improvement."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answers import is_correct as is_correct
    from .answers import same_answer as same_answer
    from .bootstrap import Interval as Interval
    from .calibration import Calibration as Calibration
    from .calibration import expected_calibration_error as expected_calibration_error
    from .comparison import Comparison as Comparison
    from .comparison import Measure as Measure
    from .comparison import Report as Report
    from .comparison import compare as compare
    from .diversity import cosine_diversity as cosine_diversity
    from .diversity import distinct_equations as distinct_equations
    from .diversity import distinct_n as distinct_n
    from .diversity import expectation_adjusted_distinct as expectation_adjusted_distinct
    from .diversity import mean_distinct as mean_distinct
    from .extraction import Found as Found
    from .extraction import final_answer as final_answer
    from .extraction import find_answer as find_answer
    from .pareto import pareto_front as pareto_front
    from .passk import mean_pass_at_k as mean_pass_at_k
    from .passk import pass_at_k as pass_at_k
    from .results import Tradeoff as Tradeoff
    from .results import read_results as read_results
    from .results import tradeoff as tradeoff
    from .reversal import Reversal as Reversal
    from .reversal import group_disparity as group_disparity
    from .reversal import improvement_set as improvement_set
    from .reversal import judge as judge
    from .samples import Model as Model
    from .samples import Problem as Problem
    from .samples import Response as Response
    from .samples import read_samples as read_samples
else:
    from ..common.lazy import lazy

    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            ".answers": "is_correct same_answer",
            ".bootstrap": "Interval",
            ".calibration": "Calibration expected_calibration_error",
            ".comparison": "Comparison Measure Report compare",
            ".diversity": "cosine_diversity distinct_equations distinct_n expectation_adjusted_distinct mean_distinct",
            ".extraction": "Found final_answer find_answer",
            ".pareto": "pareto_front",
            ".passk": "mean_pass_at_k pass_at_k",
            ".results": "Tradeoff read_results tradeoff",
            ".reversal": "Reversal group_disparity improvement_set judge",
            ".samples": "Model Problem Response read_samples",
        },
    )
