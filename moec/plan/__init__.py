"""Planning under a memory budget: which executions to repeat, in which order, so that the peak
stays within the budget and the total time is least.
"""

from moec.plan.check import Replay, replay
from moec.plan.files import read_problem, schedule_json
from moec.plan.problem import Node, Problem, make_problem
from moec.plan.solve import Plan, Progress, budget_of, solve

__all__ = [
    "Node",
    "Plan",
    "Problem",
    "Progress",
    "Replay",
    "budget_of",
    "make_problem",
    "read_problem",
    "replay",
    "schedule_json",
    "solve",
]
