"""Meters of a run: metrics, throughput, stragglers and profiler traces."""
