"""What is told of a request whose model is on its way into memory; the rest is told over sockets, in tests/e2e."""

from __future__ import annotations

from headrace.core.explain.told import Viewer
from headrace.gateway.explaining import Book, Note, _explained, _row


def test_who_waits_for_a_model_is_told_so() -> None:
    book = Book()
    book.begin(waits := Note("a", "", "", "m", ("a",), 1.0, model_ready=False))
    book.begin(Note("b", "", "", "m", ("b",), 1.0))
    assert [_row(book, note, 3.5).waits_for for note in book.notes(Viewer())] == ["its model to be loaded", ""]
    assert _explained(book, waits, Viewer(), 3.5).words == ["It has waited 2.50 s for its model to be loaded."]
    waits.end_s, waits.refused = 4.0, "Unavailable: it could not be loaded"
    assert _row(book, waits, 9.0).waits_for == ""
    assert _explained(book, waits, Viewer(), 9.0).words == [
        "It waited 3.00 s for its model to be loaded.",
        "It was refused before it was queued: Unavailable: it could not be loaded.",
    ]
