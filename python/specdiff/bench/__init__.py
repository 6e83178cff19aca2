"""Benchmarks of whole decoding: methods, tasks and targets in one harness; `specdiff bench`."""
