"""The report: every plan exported, proved, timed and compared, as a folder that a browser opens. Downstream of plans and artefacts."""
