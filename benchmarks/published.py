"""Published throughput against what the simulator predicts, nothing fitted: every row, then every system, then why.

The same scheduler and policies as live serve the published load in virtual time; a step costs the HEADRACE roofline, so
0.83 of 16-bit peaks (the measured share of 8-bit ones where there is one), 0.80 of bandwidth, 0.70 of fabrics, 3 us a
layer, and a host that is free. Rows within 20 % are right; a system is predicted when the median of its errors is.
The last column is for rows with grouped heads that miss: their error if the KV were read once for every query head.

    python benchmarks/published.py [part of a system's name, default all]
"""

from __future__ import annotations

import sys
from textwrap import wrap

from headrace.core.clock import perf
from headrace.sim.published import CLOSE, UNGROUPED, Prediction, System, by_system, experiments, predict


def show(prediction: Prediction) -> None:
    experiment = prediction.experiment
    unit = experiment.measured + ("" if experiment.per == "replica" else f"/{experiment.per}")
    verdict = "yes" if prediction.close else "no"
    if not prediction.close and experiment.grouped and experiment.overlap == "serial":
        verdict += f"   {predict(experiment, UNGROUPED).error:+.0%}"
    print(
        f"{experiment.system:<19}{experiment.setting:<80}{unit:<15}"
        f"{experiment.published:>9.1f}{prediction.predicted:>9.1f}{prediction.error:>+8.1%}  {verdict}"
    )


def conclude(systems: tuple[System, ...]) -> None:
    print(f"\n{'system':<22}{'rows':>6}{'within':>8}{'median':>8}{'from':>8}{'to':>8}  predicted")
    for system in systems:
        errors = [prediction.error for prediction in system.predictions]
        print(
            f"{system.name:<22}{len(errors):>6}{system.close:>8}{system.median_error:>8.1%}"
            f"{min(errors):>+8.0%}{max(errors):>+8.0%}  {'yes' if system.predicted else 'no'}"
        )
    for system in systems:
        print(f"\n{system.name}: {system.predictions[0].experiment.source}")
        if system.close < len(system.predictions):
            print("\n".join(wrap(f"misses: {system.predictions[0].experiment.reason}", 118)))
    print(f"\n{sum(system.predicted for system in systems)} of {len(systems)} systems within {CLOSE:.0%}")


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    begun_s = perf()
    print(
        f"{'system':<19}{'setting':<80}{'tokens/s of':<15}{'published':>9}{'here':>9}{'error':>8}  within, if ungrouped"
    )
    predictions = []
    for experiment in experiments():
        if wanted.lower() in experiment.system.lower():
            predictions.append(predict(experiment))
            show(predictions[-1])
    conclude(by_system(predictions))
    print(f"{perf() - begun_s:.0f} seconds")


if __name__ == "__main__":
    main()
