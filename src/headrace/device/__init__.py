"""Does it: the only room that imports torch. Knows StepPlan, not the scheduler."""
