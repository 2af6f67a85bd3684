"""Language models: loading them, and as RLModules with scalar or quantile critic."""
