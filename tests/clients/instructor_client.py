"""Scenarios of instructor: answers as objects of a type."""

from __future__ import annotations

import instructor
import openai
from common import MODEL, play, url
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


def ask(mode: instructor.Mode) -> Person:
    made = openai.OpenAI(base_url=f"{url()}/v1", api_key="none", max_retries=0, timeout=300)
    client = instructor.from_openai(made, mode=mode)
    said = [{"role": "user", "content": "Ada is 36 years old."}]
    options = {"model": MODEL, "max_tokens": 200, "temperature": 0, "max_retries": 1}
    return client.chat.completions.create(response_model=Person, messages=said, **options)


def tools() -> None:
    assert isinstance(ask(instructor.Mode.TOOLS), Person)


def strict_tools() -> None:
    assert isinstance(ask(instructor.Mode.TOOLS_STRICT), Person)


def json_schema() -> None:
    assert isinstance(ask(instructor.Mode.JSON_SCHEMA), Person)


play(tools, strict_tools, json_schema)
