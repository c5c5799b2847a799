"""The conversations dots1-tiny learns to answer from."""

import random
import re

from tools.tiny_chat import chats

STORY = (
    "Once upon a time there was a little dog named Rex.\nRex had a red ball. " + "He ran. " * 200
) + "In the end he slept."


def test_conversations_have_the_prompt_format_and_short_answers() -> None:
    made = list(chats(STORY, random.Random(1)))
    shape = (
        r"(<\|system\|>[^<]+<\|endofsystem\|>)?<\|userprompt\|>([^<]+)<\|endofuserprompt\|>"
        r"<\|response\|>([^<]+)<\|endofresponse\|><\|endoftext\|>"
    )
    parts = [re.fullmatch(shape, chat) for chat in made]
    users = [part[2] for part in parts if part]
    assert len(users) == len(made) == 3
    assert "a little dog" in users[0]
    assert users[1] == "Continue this story: Once upon a time there was a little dog named Rex."
    answers = [part[3] for part in parts if part]
    assert all(len(answer) <= 800 for answer in answers)
    assert all(answer.endswith("In the end he slept.") for answer in answers[:2])


def test_a_text_that_is_no_story_gives_none() -> None:
    assert list(chats("Once upon a time.", random.Random(1))) == []
