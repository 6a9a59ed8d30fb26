"""eval.serving against a server without a model; nothing is timed."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from eval.reporting import report
from eval.reporting.rows import column
from eval.serving import cells, processes, question
from eval.serving.cells import LLAMA, OURS, Cell, Talk
from eval.serving.client import Answer, AnswerError, Round, Server
from eval.serving.others import others_seconds
from hybrimoe_plugin.device.noise import Noise


def app() -> FastAPI:
    """Answers with as many letters as asked; refuses the prompt [12], breaks off at [13]."""
    made = FastAPI()

    @made.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "letters"}]}

    @made.post("/v1/completions")
    async def complete(request: Request) -> Response:
        body = await request.json()
        if body["prompt"] == [12]:
            return JSONResponse({"error": {"message": "no twelves"}}, status_code=400)
        return stream([{"text": "x"}] * body["max_tokens"], len(body["prompt"]), body)

    @made.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        said = sum(len(message["content"].split()) for message in body["messages"])
        role = [{"delta": {"role": "assistant", "content": ""}}]
        letters = [{"delta": {"content": "y"}}] * body["max_tokens"]
        return stream(role + letters, said, body)

    return made


def stream(choices: list[dict[str, Any]], prompt: int, body: dict[str, Any]) -> Response:
    async def events() -> AsyncIterator[str]:
        for choice in choices:
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            await asyncio.sleep(0)
        if body.get("prompt") == [13]:
            yield f"data: {json.dumps({'error': {'message': 'broken'}})}\n\n"
            return
        end = {**choices[-1], "text": "", "delta": {}, "finish_reason": "length"}
        usage = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"]}
        usage["prompt_tokens_details"] = {"cached_tokens": 3}
        yield f"data: {json.dumps({'choices': [end]})}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app(), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([port],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


def test_the_question_on_a_running_server(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write(tmp_path, "mixtral")
    arguments = ["--gguf_path", str(path), "--out", str(tmp_path), "--url", url, "--quick"]
    result = question.main([*arguments, "--llama_server", str(tmp_path / "none")])
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["vs_llama_cpp"] is None and said["llama_cpp"] == processes.HOW_TO_GET
    assert set(result["tok_s"]) == {1, 4} and result["times_one_client"][1] == 1
    rows = report.read_csv(tmp_path / "serving_model.csv")
    assert column(rows, "clients") == [1, 4] and column(rows, "server") == [OURS, OURS]
    (talk,) = report.read_csv(tmp_path / "serving_model_second-turns.csv")
    assert (talk["first_tokens"], talk["second_tokens"]) == (500, 500 + 1 + 16)
    assert (tmp_path / "serving_model.png").stat().st_size > 1000


def test_clients_share_the_prompts(url: str) -> None:
    done = Server(url).round([[3 + n] * (n + 1) for n in range(5)], clients=2, tokens=4)
    assert sorted(answer.prompt_tokens for answer in done.answers) == [1, 2, 3, 4, 5]
    assert {answer.text for answer in done.answers} == {"xxxx"}
    assert {(answer.tokens, answer.reason) for answer in done.answers} == {(4, "length")}
    assert all(answer.sent_s < answer.pieces_s[0] <= answer.ended_s for answer in done.answers)


@pytest.mark.parametrize(("prompt", "told"), [(12, "status 400.*no twelves"), (13, "broken")])
def test_an_answer_that_is_not_whole_is_an_error(url: str, prompt: int, told: str) -> None:
    with pytest.raises(AnswerError, match=told):
        Server(url).round([[prompt]], 1, 4)


def test_a_program_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    program = tmp_path / "server"
    program.write_text("#!/bin/sh\necho cannot open the model >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(processes.ServerError, match="status 3: cannot open the model"):
        processes.Process([str(program)], {})


def answer(sent: float, first: float, ended: float, tokens: int = 11) -> Answer:
    return Answer(sent, (first, ended), ended, "", "length", 5, tokens, 0)


def test_times_of_rows() -> None:
    cell = Cell(OURS, 2)
    done = Round([answer(0, 1, 2), answer(0, 3, 4)])
    assert done.tokens_per_s == 22 / 4
    args = Namespace(turns=1, requests=2, prompt_tokens=5, answer_tokens=11)
    (row,) = cells.cell_rows({cell: [done]}, args)
    assert row["tok_s_p50"] == 5.5 and row["ttft_ms_p50"] == 2000
    assert row["tpot_ms_p50"] == pytest.approx(100) and row["gap_ms_p95"] == pytest.approx(1000)


def test_second_turns_are_a_share_of_the_first() -> None:
    talks = {OURS: [Talk(answer(0, 2, 3), answer(5, 5.2, 6))] * 3, LLAMA: []}
    (row,) = cells.talk_rows({OURS: talks[OURS]})
    assert row["share_p50"] == pytest.approx(0.1) and row["conversations"] == 3


def test_more_clients_are_slower_only_beyond_the_spread() -> None:
    one = {"clients": 1, "tok_s_p20": 30.0, "tok_s_p80": 34.0}
    near = {"clients": 2, "tok_s_p20": 27.0, "tok_s_p80": 31.0}
    below = {"clients": 4, "tok_s_p20": 27.0, "tok_s_p80": 29.0}
    assert cells.slower([one, near, below]) == [4]


def test_noise_is_what_others_take() -> None:
    taken = iter([10.0, 10.0, 20.0, 1e6])
    assert Noise(lambda: next(taken)).verdict() == ""
    assert "other programs" in Noise(lambda: next(taken)).verdict()


def test_own_work_is_not_that_of_others() -> None:
    before = others_seconds()
    assert 0 <= before <= others_seconds() + 0.1  # ticks of 10 ms are rounded for each process
