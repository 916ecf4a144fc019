"""pyvit's benchmark suite: ``python -m benchmarks``, ``pytest benchmarks``, ``python -m benchmarks.gpu``. See
docs/benchmarks.md."""
