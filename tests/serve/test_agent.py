"""A real agent framework, Pydantic AI, in a loop of three tools over each of the APIs.

The model is dots1-tiny, which never saw a tool: the settings of each step say which tools are left,
and the grammar makes its calls valid.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelSettings, NativeOutput, RunContext
from pydantic_ai.messages import ModelMessage, ToolReturnPart
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

from tests.conftest import Converted
from tests.serve.served import Served

City = Literal["Ulm", "Paris"]
TOOLS = {"weather", "clock", "trains"}


@pytest.fixture(scope="module")
def served(converted: Converted) -> Iterator[Served]:
    with Served(converted("DQ4"), "--context", "2048") as server:
        yield server


@asynccontextmanager
async def opened(api: str, server: Served) -> AsyncIterator[Model]:
    """A model of the framework that sends to one of the server's APIs."""
    if api == "messages":
        url = server.url.removesuffix("/v1")
        async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
            yield AnthropicModel("dots1", provider=AnthropicProvider(anthropic_client=client))
        return
    kind = OpenAIChatModel if api == "chat" else OpenAIResponsesModel
    async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as other:
        yield kind("dots1", provider=OpenAIProvider(openai_client=other))


async def run(agent: Agent[None, Any], api: str, server: Served, **options: Any) -> Any:
    async with opened(api, server) as model:
        return await agent.run("When can I go to Paris?", model=model, **options)


async def read_all(context: RunContext[None], events: AsyncIterable[Any]) -> None:
    """Make the framework stream its answers."""
    async for _ in events:
        pass


def weather(city: City, days: Annotated[int, Field(ge=1, le=7)]) -> str:
    """The weather in a city."""
    assert city in ("Ulm", "Paris")
    assert days in range(1, 8)
    return f"It rains in {city}."


def clock() -> str:
    """The time."""
    return "It is noon."


def trains(start: City, fast: bool) -> list[str]:
    """The trains that leave a city."""
    assert start in ("Ulm", "Paris")
    assert isinstance(fast, bool)
    return ["ICE 1", "ICE 2"]


def returned(messages: list[ModelMessage]) -> dict[str, object]:
    """The results that the tools gave, by their names."""
    parts = (part for message in messages for part in message.parts)
    return {part.tool_name: part.content for part in parts if isinstance(part, ToolReturnPart)}


def settings(context: RunContext[None]) -> ModelSettings:
    """Require a tool that was not called yet; when there is none, let the model answer."""
    left = sorted(TOOLS - set(returned(context.messages)))
    return ModelSettings(
        tool_choice=left or "none", parallel_tool_calls=False, max_tokens=200 if left else 40
    )


@pytest.mark.parametrize(
    ("api", "handler"),
    [("chat", None), ("chat", read_all), ("responses", read_all), ("messages", read_all)],
)
def test_an_agent_calls_three_tools_and_answers(served: Served, api: str, handler: Any) -> None:
    agent = Agent(
        tools=[weather, clock, trains], model_settings=settings, instructions="You plan trips."
    )
    result = asyncio.run(run(agent, api, served, event_stream_handler=handler))
    results = returned(result.all_messages())
    assert set(results) == TOOLS
    assert results["clock"] == "It is noon."
    assert results["trains"] == ["ICE 1", "ICE 2"]
    assert result.output
    assert result.usage.requests == 4


class Trip(BaseModel):
    city: City
    day: int = Field(ge=1, le=31)


TYPED = ModelSettings(parallel_tool_calls=False, max_tokens=200)


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_an_agent_with_a_tool_gives_a_typed_answer(served: Served, api: str) -> None:
    agent = Agent(output_type=NativeOutput(Trip), tools=[clock])
    result = asyncio.run(run(agent, api, served, model_settings=TYPED))
    assert isinstance(result.output, Trip)
