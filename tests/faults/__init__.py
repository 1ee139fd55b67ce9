"""Faults that really happen, and how often the package withstands them.

    python -m tests.faults                      all long versions
    python -m tests.faults numerics masks       some of them
    python -m tests.faults --short masks        as in `make test`

Each harness is a function from a size to counts. The long versions write
`benchmarks/results/faults-NAME.json`; short versions run under pytest.
"""
