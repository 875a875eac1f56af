"""Does it: with native kernels, or with torch in `reference`. Knows StepPlan, not the scheduler."""
