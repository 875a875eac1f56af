"""`headrace keys`: who may use the server, and how much.

Examples:
  headrace keys add alice --requests-per-minute 60 --tokens-per-minute 20000
  headrace keys add batch-job --tenant research --concurrency 2 --budget 5000000 --priority -10 --expires 30d
  headrace keys add ops --admin
  headrace keys list
  headrace keys revoke alice

With the first key the server begins to ask every request for one; a server that runs sees every change at once. A
client sends its key as 'Authorization: Bearer KEY' or 'x-api-key: KEY'. `add` shows the key once,
alone on its output, and only a hash of it is kept: KEY=$(headrace keys add alice).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.core import clock, config
from headrace.core.config import BadSetting, KeySettings, LimitSettings

if TYPE_CHECKING:
    from headrace.gateway.keys import Guard, Key
    from headrace.gateway.limits import Store
    from headrace.gateway.state.keyfile import KeyFile, Wanted

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def add(commands: Any) -> None:
    from headrace.cli import Formatter

    parser = commands.add_parser(
        "keys", help="say who may use the server", description=__doc__, formatter_class=Formatter
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = _action(actions, "add", "issue a key and show it once", _add)
    new.add_argument("name", metavar="NAME", help="for people: who or what it is for; letters, digits and . _ @ -")
    new.add_argument("--admin", action="store_true", help="also opens /metrics and everybody's requests")
    new.add_argument(
        "--tenant",
        metavar="NAME",
        help="whose files, batches, responses and cached prompts it sees (default: its name)",
    )
    new.add_argument("--models", metavar="A,B", default="", help="the models it may use (default: all)")
    new.add_argument("--requests-per-minute", type=_count, metavar="N", help="calls of any kind that compute something")
    new.add_argument(
        "--tokens-per-minute",
        type=_count,
        metavar="N",
        help="of prompts and answers; a call begins with its max_tokens",
    )
    new.add_argument("--concurrency", type=_count, metavar="N", help="calls under way at once")
    new.add_argument("--budget", type=_count, metavar="TOKENS", help="tokens altogether, for as long as the key lives")
    new.add_argument(
        "--priority", type=int, default=0, metavar="P", help="-49 to 49, under --ordering priority (default: 0)"
    )
    new.add_argument(
        "--weight",
        type=float,
        default=1.0,
        metavar="W",
        help="its tenant's share, under --ordering vtc or drr (default: 1)",
    )
    new.add_argument("--expires", type=_duration, metavar="TIME", help="such as 12h, 30d or 8w (default: never)")
    _action(actions, "list", "show all keys and what they have used", _list)
    _action(actions, "show", "show everything about one key", _show).add_argument("name", metavar="NAME")
    _action(actions, "revoke", "end a key at once", _revoke).add_argument("name", metavar="NAME")


def _action(actions: Any, name: str, says: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=says, description=says.capitalize() + ".")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with a section [key]")
    config.add_flags(parser, KeySettings)
    parser.set_defaults(run=run)
    return parser


def file_of(args: argparse.Namespace, toml: Any = None) -> KeyFile:
    from headrace.gateway.state.keyfile import KeyFile

    settings = config.load(KeySettings, args, toml if toml is not None else config.read_toml(args.config))
    return KeyFile(settings.keys_file or config.home() / "keys.sqlite3")


def guard_of(file: KeyFile) -> Guard:
    """Who asks for the keys of a file, and for the one in the environment. Raises BadKey."""
    from headrace.gateway.keys import Guard, ring_of

    return Guard(file.current, ring_of(config.api_key()), clock.wall)


def limits_of(file: KeyFile, settings: LimitSettings) -> Store:
    """The accounts of all keys, with what earlier processes have spent of their budgets. Raises BadSetting."""
    from headrace.gateway.limits import InProcess, Ledger

    apart = InProcess(Ledger(file.spent()), clock.now, file.charge)
    if settings.limits_redis is None:
        return apart
    try:
        from headrace.gateway.shared_limits import Shared
    except ImportError as error:
        raise BadSetting("--limits-redis needs a client for it: pip install 'headrace[redis]'") from error
    try:  # the message of a ValueError may show a password
        fallback = apart if settings.limits_when_lost == "open" else None
        return Shared(settings.limits_redis, fallback, file.spent(), file.charge)
    except ValueError:
        raise BadSetting("--limits-redis is no address of a Redis; write redis://HOST:PORT/0") from None


def _add(args: argparse.Namespace) -> int:
    from headrace.gateway.keys import new_secret

    secret = new_secret()
    now_s = int(clock.wall())
    key = file_of(args).add(_wanted(args, now_s), secret, now_s)
    print(secret)
    what = "an admin's key" if key.admin else "a key"
    print(f"{what} named {key.name} of tenant {key.tenant}; it is not shown again", file=sys.stderr)
    return 0


def _wanted(args: argparse.Namespace, now_s: int) -> Wanted:
    """Raises BadSetting."""
    from headrace.gateway.keys import NAME, PRIORITIES
    from headrace.gateway.limits import Limits
    from headrace.gateway.state.keyfile import Wanted

    tenant = args.tenant or args.name
    for name in (args.name, tenant):
        if not NAME.fullmatch(name):
            raise BadSetting(f"{name!r} is no name: begin with a letter or digit; at most 64 of these and . _ @ -")
    if args.priority not in PRIORITIES:
        raise BadSetting(f"--priority lies from {PRIORITIES[0]} to {PRIORITIES[-1]}")
    if not 1e-3 <= args.weight <= 1e3:
        raise BadSetting("--weight lies from 0.001 to 1000")
    limits = Limits(args.requests_per_minute, args.tokens_per_minute, args.concurrency, args.budget)
    models = tuple(filter(None, (model.strip() for model in args.models.split(","))))
    expires_s = None if args.expires is None else now_s + args.expires
    return Wanted(args.name, tenant, args.admin, models, limits, args.priority, args.weight, expires_s)


def _list(args: argparse.Namespace) -> int:
    file = file_of(args)
    spent, now_s = file.spent(), clock.wall()
    rows = [("NAME", "ID", "TENANT", "STATE", "REQ/MIN", "TOK/MIN", "AT ONCE", "BUDGET", "USED", "MODELS")]
    for key in file.all():
        limits = key.limits
        most = (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency, limits.budget_tokens)
        counts = ["-" if count is None else str(count) for count in most]
        used, models = str(spent.get(key.id, 0)), ",".join(key.models) or "all"
        rows.append((key.name, key.id, key.tenant, _state(key, now_s), *counts, used, models))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(rows) == 1:
        print("no keys yet, so nobody is asked for one: `headrace keys add NAME`")
    return 0


def _show(args: argparse.Namespace) -> int:
    file = file_of(args)
    key, now_s = file.find(args.name), clock.wall()
    limits, used = key.limits, file.spent().get(key.id, 0)
    facts = {
        "name": key.name,
        "id": f"{key.id} (names it in logs and metrics)",
        "tenant": key.tenant,
        "state": _state(key, now_s),
        "models": ", ".join(key.models) or "all",
        "requests": _most(limits.requests_per_minute, "a minute"),
        "tokens": _most(limits.tokens_per_minute, "a minute"),
        "at once": _most(limits.concurrency, "calls"),
        "budget": f"{used} used of {_most(limits.budget_tokens, 'tokens')}",
        "priority": str(key.priority),
        "weight": f"{key.weight:g}",
    }
    for name, fact in facts.items():
        print(f"{name:10} {fact}")
    return 0


def _revoke(args: argparse.Namespace) -> int:
    key = file_of(args).revoke(args.name, int(clock.wall()))
    print(f"{key.name} ({key.id}) is revoked: the next request with it gets a 401; those under way end as they would")
    return 0


def _state(key: Key, now_s: float) -> str:
    if key.revoked_s is not None:
        return "revoked"
    kind = "admin" if key.admin else "user"
    if key.expires_s is None:
        return kind
    left_s = key.expires_s - now_s
    return f"{kind}, {left_s / 86_400:.0f} d left" if left_s > 0 else "expired"


def _most(count: int | None, what: str) -> str:
    return "no limit" if count is None else f"{count} {what}"


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,15}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _duration(text: str) -> int:
    match = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 12h, 30d or 8w")
    return int(match[1]) * _SECONDS[match[2]]
