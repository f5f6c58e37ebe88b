"""Tools called through llama-server's JSON schema, where a long prompt stands before the wish."""

from __future__ import annotations

import json

#: Nothing is rounded but the cache, which is what this is about: rounded weights can cost a model of this size the answer.
CACHE_ALONE = ("--rotation", "hadamard", "--weights", "f32", "--kv", "auto")
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
#: Parameters of the tools that a model may call: name, type or choices.
TOOLS = {
    "set_reminder": {"task": {"type": "string"}, "weekday": {"enum": WEEKDAYS}, "hour": {"type": "integer"}},
    "get_weather": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
}


def closed(properties: dict) -> dict:
    """The schema of an object that has these and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def call_of(text: str) -> tuple[str, dict]:
    """Name and arguments of a call that the tools allow; anything else fails."""
    found = json.loads(text)
    assert set(found) == {"name", "arguments"} and found["name"] in TOOLS, text
    parameters = TOOLS[found["name"]]
    assert set(found["arguments"]) == set(parameters), text
    for name, value in found["arguments"].items():
        allowed = parameters[name].get("enum")
        assert value in allowed if allowed else type(value) is {"string": str, "integer": int}[parameters[name]["type"]], text
    return found["name"], found["arguments"]


def call_behind_a_document(post, port: int, document: str, wish: str) -> tuple[str, dict]:
    """The tool that a server's model calls, by JSON schema, where a document of 4,000 tokens stands before the wish."""
    tokens = post(port, "/tokenize", {"content": document})[1]["tokens"]
    assert len(tokens) >= 4000
    document = post(port, "/detokenize", {"tokens": tokens[:4000]})[1]["content"]
    system = f'Answer with a call of one of these tools, {{"name": …, "arguments": …}}:\n{json.dumps(TOOLS)}'
    calls = [closed({"name": {"const": name}, "arguments": closed(parameters)}) for name, parameters in TOOLS.items()]
    body = {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": f"{document}\n\nThat was a document. {wish}"},
        ],
        "response_format": {"type": "json_schema", "json_schema": {"name": "call", "schema": {"anyOf": calls}}},
        "max_tokens": 256, "temperature": 0,
    }  # fmt: skip
    status, answer = post(port, "/v1/chat/completions", body)
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] > 4000
    assert answer["choices"][0]["finish_reason"] == "stop", answer
    return call_of(answer["choices"][0]["message"]["content"])


def test_tools_are_called_by_schema_behind_a_long_prompt(serving, post, converted, qwen, text) -> None:
    """The schema sees to the form if the model comes to an end; the right call needs a cache that still holds the prompt."""
    path = converted(qwen, *CACHE_ALONE)
    with serving("llama-server", "-m", path, "-c", "4608", "-np", "1") as port:
        document = text.read_text(encoding="utf-8")
        name, reminder = call_behind_a_document(post, port, document, "Remind me to call the dentist on Thursday at 15 o'clock.")
        # a model of this size does not always copy the task, whatever its cache
        assert (name, reminder["weekday"], reminder["hour"]) == ("set_reminder", "Thursday", 15)
        name, place = call_behind_a_document(post, port, document, "How warm is it in Lisbon, in celsius?")
        assert (name, place) == ("get_weather", {"city": "Lisbon", "unit": "celsius"})
