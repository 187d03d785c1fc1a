"""Run directories as those see them who did not make them: reports, status, lineage, tracking."""
