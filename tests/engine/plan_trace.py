"""Prints every plan of one crowded run; two processes with different hash seeds must print the same."""

from __future__ import annotations

import random

from engine_rig import Rig, make_request


def main() -> None:
    rng = random.Random(7)
    rig = Rig(blocks=14, budget=13, ordering="priority", max_running=6)
    for number in range(40):
        prompt = [*range(rng.choice([0, 4, 9])), *rng.choices(range(5), k=rng.randint(1, 9))]
        more = {"priority": rng.randint(0, 2), "stop_token_ids": frozenset(rng.sample(range(50), 3))}
        rig.add(make_request(f"r{number}", prompt, rng.randint(1, 12), **more))
        if rng.random() < 0.2:
            rig.abort(f"r{rng.randint(0, number)}")
        rig.step()
    rig.drain()
    for plan in rig.plans:
        admitted = [(one.request.id, one.blocks, one.output_ids) for one in plan.admitted]
        print(plan.step, plan.work, admitted, plan.released)


if __name__ == "__main__":
    main()
