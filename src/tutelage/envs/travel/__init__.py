"""Trips in invented countries: tables, tools, queries, plans and their scores.

Every constraint of a query but the budget is met by one choice; many plans may have these choices.
"""

from tutelage.envs.travel.task import TravelTask

__all__ = ["TravelTask"]
