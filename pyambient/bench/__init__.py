"""Floor 5: benchmarks. They print tables of medians and ratios, and write the raw numbers."""
