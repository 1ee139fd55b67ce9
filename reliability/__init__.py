"""Faults that really happen, and how often the package withstands them.

    python -m reliability                      all long versions
    python -m reliability numerics masks       some of them
    python -m reliability --short masks        as in `make test`

Each harness is a function from a size to counts. The long versions write
`benchmarks/results/faults-NAME.json`; short versions run under pytest.
"""
