"""Trips in invented countries: tables, tools, queries with one solution, plans and their scores."""

from tutelage.envs.travel.task import TravelTask

__all__ = ["TravelTask"]
