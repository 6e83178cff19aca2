"""Benchmarks of complete decoding runs, behind `specdiff bench`."""
