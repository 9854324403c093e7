"""Items of a conversation become the messages that they were."""

from pydantic import TypeAdapter

from jaxserve.openai.messages import for_template
from jaxserve.openai.response_items import AnyItem, messages_of

CALL = {
    "type": "function_call",
    "call_id": "c1",
    "name": "f",
    "arguments": '{"a": 1}',
    "status": "completed",
    "id": "fc",
}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
THOUGHT = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "7"}]}


def said(text, role="assistant"):
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "id": "msg", "role": role, "status": "completed", "content": [part]}


def messages(*items):
    return for_template(messages_of(TypeAdapter(list[AnyItem]).validate_python(list(items))))


def test_thoughts_text_and_calls_of_one_answer_are_one_message():
    (made,) = messages(THOUGHT, said("Let me."), CALL, CALL | {"call_id": "c2"})
    assert made["content"] == "Let me."
    assert made["reasoning_content"] == "Hm."
    assert made["tool_calls"] == [CALLED, CALLED | {"id": "c2"}]


def test_a_call_without_text_is_a_message_of_its_own():
    user, answer, result, last = messages({"role": "user", "content": "Hi"}, THOUGHT, CALL, RESULT, said("So."))
    assert user == {"role": "user", "content": "Hi"}
    assert (answer["content"], answer["reasoning"], answer["tool_calls"]) == ("", "Hm.", [CALLED])
    assert result == {"role": "tool", "content": "7", "tool_call_id": "c1"}
    assert last == {"role": "assistant", "content": "So."}


def test_thoughts_of_a_later_answer_do_not_reach_back():
    first, second = messages(said("One."), THOUGHT, CALL)
    assert "reasoning" not in first
    assert "tool_calls" not in first
    assert second["reasoning"] == "Hm."


def test_arguments_that_are_no_json_stay_text():
    (made,) = messages(CALL | {"arguments": '{"a": '})
    assert made["tool_calls"][0]["function"]["arguments"] == '{"a": '
