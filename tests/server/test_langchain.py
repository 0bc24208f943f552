"""LangChain's OpenAI classes work against the server as they are."""

import pytest

from minllama.server.run import HttpServer

langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai")


def test_a_chat_is_whole_and_streamed(server: HttpServer) -> None:
    model = langchain.ChatOpenAI(
        model="tiny",
        base_url=f"{server.url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=12,
        max_retries=0,
    )
    whole = model.invoke("What is a llama?")
    assert whole.content
    assert whole.usage_metadata["output_tokens"] <= 12
    assert whole.response_metadata["model_name"] == "tiny"
    streamed = [chunk.content for chunk in model.stream("What is a llama?")]
    assert "".join(streamed) == whole.content


def test_a_completion_and_embeddings(server: HttpServer) -> None:
    common = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
    model = langchain.OpenAI(model="tiny", temperature=0, max_tokens=8, **common)
    assert model.invoke("Once upon a time")
    embedder = langchain.OpenAIEmbeddings(model="tiny", **common, check_embedding_ctx_length=False)
    one, other = embedder.embed_documents(["a text", "another one"])
    assert len(one) == len(other) == 32
    assert one != other
