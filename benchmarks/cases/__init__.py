"""Cases: what is measured, one file per subject; `benchmarks.suites` names the measures."""
