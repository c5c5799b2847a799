from dots1_local.chat.message import Message
from dots1_local.chat.turns import drop_oldest, last_turn, turns_to_drop

SYSTEM, NOTE = Message("system", "s"), Message("system", "note")


def turn(size: int) -> list[Message]:
    """A question of `size` - 1 characters and an answer of one."""
    return [Message("user", "u" * (size - 1)), Message("assistant", "a")]


def size(messages: list[Message]) -> int:
    return sum(len(message.text) for message in messages)


def to_drop(messages: list[Message], limit: int) -> int:
    return turns_to_drop(messages, lambda kept: size(list(kept)), limit)


def test_a_turn_is_a_question_and_all_that_follows() -> None:
    messages = [SYSTEM, *turn(2), NOTE, *turn(3), Message("user", "now")]
    assert last_turn(messages) == 6
    assert drop_oldest(messages, 0) == messages
    assert drop_oldest(messages, 1) == [SYSTEM, NOTE, *messages[4:]]
    assert drop_oldest(messages, 2) == [SYSTEM, NOTE, messages[-1]]
    assert last_turn([SYSTEM]) is None


def test_turns_take_half_of_their_room_afterwards() -> None:
    messages = [SYSTEM, *(each for _ in range(20) for each in turn(10)), Message("user", "x" * 9)]
    # Of 110 tokens, system and question take 10; five turns of 10 are half of the other 100.
    assert to_drop(messages, 110) == 15


def test_all_are_dropped_where_all_are_too_much() -> None:
    messages = [SYSTEM, *turn(10), *turn(10), Message("user", "x" * 99)]
    assert to_drop(messages, 50) == 2
    assert to_drop(messages[-1:], 50) == 0
    assert to_drop([SYSTEM], 0) == 0
