"""Policies: functions from a teacher's scores and a budget to a `CachePlan`."""
