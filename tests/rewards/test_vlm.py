"""A judge against a server of the test's own, which answers well, slowly, wrongly and not at all."""

import base64
import io
import math
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import TypeAdapter

from varfast import InputError
from varfast.data.prompts import Prompt, PromptSet
from varfast.rewards import RewardConfig, WeightedSum
from varfast.rewards.answers import Unreadable, number, yes_no, yes_probability
from varfast.rewards.judge_templates import TEMPLATES
from varfast.rewards.vlm import VlmReward
from varfast.train import train
from varfast.types import NotFiniteReward

from .servers import respond, serving

LABELS = torch.tensor([2, 0, 1, 1, 0, 2])
PROMPTS = PromptSet(
    (
        Prompt("a red cube", "colour", {"include": [{"class": "cube", "count": 1}], "count": 1}),
        Prompt('two "cats" {tag}', "counting", {"include": [], "count": 2}),
        Prompt("ein Bär", "", {"include": [], "count": 1}),
    )
)


@pytest.fixture
def server():
    with serving() as made:
        yield made


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the judge would have waited between attempts."""
    waited = []
    monkeypatch.setattr("varfast.rewards.client._pause", lambda seconds, stop: waited.append(seconds))
    return waited


def judge(url, prompts=None, **settings):
    settings = {"model": "judge-7b", "question": "Does this image show {prompt}? Answer yes or no."} | settings
    settings = {key: value for key, value in settings.items() if value is not None}
    config = VlmReward(type="vlm", url=f"{url}/v1", **settings)
    return WeightedSum({"mine": config}, prompts=prompts, names=["cube", "cat", "bear"])


def number_judge(url, **settings):
    return judge(url, **{"question": "Rate it.", "answer": "number", "range": [1.0, 5.0]} | settings)


def completion(text, tokens=None, reason="stop"):
    logprobs = None if tokens is None else {"content": tokens}
    return {"id": "x", "object": "chat.completion", "choices": [
        {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": logprobs, "finish_reason": reason}
    ]}  # fmt: skip


def token(text, **alternatives):
    """As the server of vLLM writes one: its alternatives with their log-probabilities."""
    top = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in alternatives.items()]
    return {"token": text, "logprob": -0.1, "bytes": list(text.encode()), "top_logprobs": top}


def says(text, tokens=None, reason="stop"):
    return respond(200, completion(text, tokens, reason))


def sent_image(body):
    """Of a request: (format, pixels)."""
    url = body["messages"][-1]["content"][0]["image_url"]["url"]
    head, _, data = url.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image.format, np.asarray(image)


def sent_text(body):
    return body["messages"][-1]["content"][1]["text"]


# ---------------------------------------------------------------------------------------------------------------------
# What is asked


def test_vlm_asks_a_chat_completion_of_each_image(server, images):
    server.answers.append(says("Yes", [token("Yes", Yes=0.6, No=0.2)]))
    scored = judge(server.url, system="You judge.", concurrency=1)(images, LABELS)
    torch.testing.assert_close(scored.components["mine"], torch.full((6,), 0.75))
    assert server.paths == ["/v1/chat/completions"] * 6
    levels = images.mul(255).round().permute(0, 2, 3, 1).numpy()
    for body, level, name in zip(server.asked, levels, ["bear", "cube", "cat", "cat", "cube", "bear"], strict=True):
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert body["messages"][0]["content"] == "You judge."
        assert [part["type"] for part in body["messages"][1]["content"]] == ["image_url", "text"]
        assert sent_text(body) == f"Does this image show {name}? Answer yes or no."
        kind, pixels = sent_image(body)
        assert kind == "PNG"
        np.testing.assert_array_equal(pixels, level)
        rest = {key: value for key, value in body.items() if key != "messages"}
        assert rest == {"model": "judge-7b", "temperature": 0.0, "max_tokens": 8, "seed": 0, "logprobs": True,
                        "top_logprobs": 20}  # fmt: skip


def test_vlm_settings_of_a_request(server, images):
    server.answers.append(says("Yes"))
    settings = {"temperature": 0.5, "max_tokens": 3, "seed": 9, "top_logprobs": 0, "extra": {"top_p": 0.9}}
    judge(server.url, **settings)(images[:1], LABELS[:1])
    extra = {"max_completion_tokens": 5, "chat_template_kwargs": {"enable_thinking": False}}
    config = VlmReward(type="vlm", url=server.url + "/", model="m", question="?", temperature=None, seed=None,
                       top_logprobs=0, extra=extra)  # fmt: skip
    WeightedSum({"mine": config})(images[:1], LABELS[:1])
    with pytest.raises(NotFiniteReward):
        number_judge(server.url, retries=0)(images[:1], LABELS[:1])
    bodies = [{key: value for key, value in body.items() if key != "messages"} for body in server.asked]
    assert bodies[0] == {"model": "judge-7b", "temperature": 0.5, "max_tokens": 3, "seed": 9, "top_p": 0.9}
    assert bodies[1] == {"model": "m", **extra}
    assert bodies[2] == {"model": "judge-7b", "temperature": 0.0, "max_tokens": 1024, "seed": 0}
    assert server.paths == ["/v1/chat/completions", "/chat/completions", "/v1/chat/completions"]


def test_vlm_fills_in_prompt_tag_and_metadata(server, images):
    server.answers.append(says("yes", [token("yes", yes=1.0)]))
    text = 'Tag {tag}, {count} of {include} in {prompt}? {"a": {not a name}}'
    judge(server.url, PROMPTS, question=text, concurrency=1)(images, LABELS)
    assert [sent_text(body) for body in server.asked[:3]] == [
        'Tag , 1 of [] in ein Bär? {"a": {not a name}}',
        'Tag colour, 1 of [{"class": "cube", "count": 1}] in a red cube? {"a": {not a name}}',
        'Tag counting, 2 of [] in two "cats" {tag}? {"a": {not a name}}',
    ]


def test_vlm_a_prompt_that_lacks_what_a_question_says_is_refused_before_training(server):
    with pytest.raises(
        InputError, match=r"reward.mine.question asks for \{colour\}, which the prompt 'a red cube' has"
    ):
        judge(server.url, PROMPTS, question="Is it {colour}?")
    with pytest.raises(InputError, match=r"reward.mine.question asks for \{tag\}, .*; it has prompt"):
        judge(server.url, question="Is it {tag}?")(torch.zeros(1, 3, 4, 4), LABELS[:1])
    assert server.asked == []


@pytest.mark.parametrize(("image", "atol"), [("png", 1.0), ("jpeg", 6.0)])
def test_vlm_shrinks_larger_images(server, image, atol):
    server.answers.append(says("yes", [token("yes", yes=1.0)]))
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 32, 64)
    judge(server.url, image=image, max_side=16)(ramp, LABELS[:1])
    judge(server.url, image=image, max_side=64)(ramp, LABELS[:1])
    (kind, small), (_, whole) = map(sent_image, server.asked)
    assert (kind, small.shape, whole.shape) == (image.upper(), (8, 16, 3), (32, 64, 3))
    means = ramp.mul(255).round().reshape(1, 3, 8, 4, 16, 4).mean(dim=(3, 5))[0].permute(1, 2, 0)
    np.testing.assert_allclose(small[:, 2:-2], means[:, 2:-2], atol=atol)  # the filter reaches over the edge


def test_vlm_averages_questions(server, images):
    def answer(server, handler, body):
        says("4" if "sharp" in sent_text(body) else "1")(server, handler, body)

    server.answers.append(answer)
    both = ["Is it sharp, 1 to 5?", "Is it {prompt}, 1 to 5?"]
    scored = number_judge(server.url, question=both, scale=True)(images, LABELS)
    torch.testing.assert_close(scored.total_B, torch.full((6,), (0.75 + 0.0) / 2))
    assert sorted(map(sent_text, server.asked))[-1] == "Is it sharp, 1 to 5?"
    assert len(server.asked) == 12


def test_unified_rewards_answers_in_their_own_form(server, images):
    """The second answer is that of the public example."""
    server.answers += [
        says("cat (animal): 1\nred (color): 0\nFinal Score: 3.5"),
        says("Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\n"
             "Style Score (1-5): 2.802500009536743"),
    ]  # fmt: skip
    first, second = (
        judge(server.url, question=None, template=name)(images[:1], LABELS[:1]).total_B.item()
        for name in ("unified_reward", "unified_reward_2")
    )
    assert (first, second) == (3.5, pytest.approx((2.6947 + 2.3715 + 2.8025) / 3))
    assert all(sent_text(body).endswith("Caption: [bear]") for body in server.asked)
    assert [t.question.count("{prompt}") for t in TEMPLATES.values()] == [1, 1]


def test_a_template_takes_the_question_that_the_model_was_trained_with(server, images):
    server.answers.append(says("Final Score: 5"))
    asked = judge(server.url, question="Rate {prompt} as you learned it.", template="unified_reward", scale=True)
    assert asked(images[:1], LABELS[:1]).total_B.item() == 1.0
    assert sent_text(server.asked[-1]) == "Rate bear as you learned it."


# ---------------------------------------------------------------------------------------------------------------------
# How answers are read


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([token("Yes", Yes=0.7, No=0.3)], 0.7),
        ([token("No", Yes=0.1, No=0.3)], 0.25),
        ([token("Yes", **{"Yes": 0.2, "yes": 0.1, " yes": 0.1, "YES": 0.1, " No": 0.05, "no": 0.05})], 5 / 6),
        ([token("\n", **{"\n": 0.9}), token("yes", yes=0.5, no=0.5)], 0.5),
        ([token("\u2581Yes", **{"\u2581Yes": 0.6, "\u0120no": 0.2})], 0.75),
        ([token("Yes", Yes=0.9, Yesterday=0.05, None_=0.05)], 1.0),
        (None, None),
        ([], None),
        ([{"token": "Yes", "logprob": -0.1}], None),
        ([{"token": "Yes", "logprob": -0.1, "top_logprobs": []}], None),
    ],
)  # fmt: skip
def test_yes_probability_is_of_the_first_token_that_says_something(tokens, expected):
    found = yes_probability(tokens)
    assert found == (expected if expected is None else pytest.approx(expected, rel=1e-12))


def test_yes_probability_of_another_answer_is_none():
    with pytest.raises(Unreadable, match=r"together have the probability 0.05 at the first token"):
        yes_probability([token("The", The=0.9, Yes=0.04, No=0.01)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes", 1), ("yes.", 1), (" **No**", 0), ('"No," it is', 0), ("No, the cat is black.", 0), ("YES\nbecause", 1),
     ("Yesterday", None), ("No idea", None), ("", None), ("I think yes", None), ("yes no", None), ("no-one", None)],
)  # fmt: skip
def test_yes_no_is_the_first_word_of_a_text(text, expected):
    if expected is None:
        with pytest.raises(Unreadable):
            yes_no(text)
    else:
        assert yes_no(text) == expected


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("3", {}, 3.0),
        (" 4.5\n", {}, 4.5),
        ("Score: 3", {}, None),
        ("nan", {}, None),
        ("1e0", {}, None),
        ("6", {}, None),
        ("0.9", {}, None),
        ("Score: 3", {"patterns": [r"Score: (\d)"]}, 3.0),
        ("Score: 3, so Score: 3", {"patterns": [r"Score: (\d)"]}, 3.0),
        ("Score: 3 or Score: 4", {"patterns": [r"Score: (\d)"]}, None),
        ("a: 1 b: 4", {"patterns": [r"a: (\d)", r"b: (\d)"]}, 2.5),
        ("a: 1", {"patterns": [r"a: (\d)", r"b: (\d)"]}, None),
        ("a: 1 b: 9", {"patterns": [r"a: (\d)", r"b: (\d)"]}, None),
        ("score: x", {"patterns": [r"score: (\w)"]}, None),
        ("score: ", {"patterns": [r"score: (\d)?"]}, None),
        ('{"score": 2, "why": "."}', {"json_key": "score"}, 2.0),
        ('```json\n{"score": 2.5}\n```', {"json_key": "score"}, 2.5),
        ('{"score": "2"}', {"json_key": "score"}, None),
        ('{"score": true}', {"json_key": "score"}, None),
        ('{"score": NaN}', {"json_key": "score"}, None),
        ('{"score": 1' + "0" * 400 + "}", {"json_key": "score"}, None),
        ("[2]", {"json_key": "score"}, None),
        ("[" * 100_000, {"json_key": "score"}, None),
        ("2", {"json_key": "score"}, None),
    ],
)
def test_number_is_read_strictly(text, settings, expected):
    settings = {"patterns": [], "json_key": None} | settings
    if expected is None:
        with pytest.raises(Unreadable):
            number(text, **settings, least=1.0, greatest=5.0)
    else:
        assert number(text, **settings, least=1.0, greatest=5.0) == expected


def test_vlm_scales_a_range_to_one(server, images):
    server.answers.append(says("4"))
    assert number_judge(server.url)(images[:1], LABELS[:1]).total_B.item() == 4.0
    assert number_judge(server.url, scale=True)(images[:1], LABELS[:1]).total_B.item() == 0.75


def test_vlm_without_log_probabilities_reads_the_text_and_says_so_once(server, images):
    server.answers += [says("No."), says("Yes, it does")]
    with pytest.warns(UserWarning, match="reward mine: the server gives no log-probabilities") as said:
        scored = judge(server.url, concurrency=1)(images, LABELS)
    assert scored.total_B.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert len(said) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Answers that are of no use


def test_vlm_asks_again_where_an_answer_cannot_be_read_and_then_leaves_the_rollout_out(server, waits, images):
    server.answers += [says("Hm."), says(None), says("4")]
    assert number_judge(server.url)(images[:1], LABELS[:1]).total_B.item() == 4.0
    assert [body["seed"] for body in server.asked] == [0, 1, 2]
    server.answers.append(says("I cannot \x1b[2Jjudge " + "x" * 1000, reason="length"))
    with pytest.raises(NotFiniteReward, match=r"the answer for image 0 is 'I cannot \\x1b\[2Jjudge x+' \.\.\., which "
                       r"max_tokens cut off; want a number \(asked 2 times\); mend reward.mine.question"):  # fmt: skip
        number_judge(server.url, retries=1)(images[:1], LABELS[:1])
    assert len(server.asked) == 5
    assert waits == []


def test_vlm_scores_an_unreadable_answer_as_the_config_says(server, images):
    server.answers.append(says("Hm."))
    with pytest.warns(UserWarning, match=r"an answer is 'Hm.'; want a number; such images score 1.5") as said:
        scored = number_judge(server.url, unreadable=1.5, retries=1)(images, LABELS)
    assert scored.total_B.tolist() == [1.5] * 6
    assert len(said) == 1
    assert len(server.asked) == 12


@pytest.mark.parametrize(
    "answer",
    [b"<html>", b"\xff", [], {"choices": []}, {"choices": [{"message": {}}]}, {"error": {"message": "no"}}, None,
     completion(3), completion(["a"]), {"choices": [{"message": {"content": "4"}}] * 0}],
)  # fmt: skip
def test_vlm_an_answer_that_is_no_chat_completion_ends_the_run_at_once(server, waits, images, answer):
    server.answers.append(respond(200, answer))
    with pytest.raises(InputError, match=rf"reward.mine.url={re.escape(server.url)}/v1: .*want a chat") as caught:
        number_judge(server.url)(images[:1], LABELS[:1])
    assert not isinstance(caught.value, NotFiniteReward)
    assert len(server.asked) == 1
    assert waits == []


def test_vlm_waits_as_long_as_the_server_asks(server, waits, images):
    far = "Fri, 31 Dec 9999 23:59:59 GMT"
    server.answers += [
        respond(429, b"slowly", Retry_After="7"), respond(503, b"full", Retry_After="1"),
        respond(500, b"x", Retry_After="soon"), respond(408, b"x"), respond(429, b"x", Retry_After=far),
        respond(429, b"x", Retry_After="Thu, 01 Jan 1970 00:00:00 GMT"), respond(429, b"x", Retry_After="9" * 400),
        says("4"),
    ]  # fmt: skip
    assert number_judge(server.url, retries=10)(images[:1], LABELS[:1]).total_B.item() == 4.0
    assert waits == [7.0, 2.0, 4.0, 8.0, 300.0, 30.0, 30.0]


def test_vlm_gives_up_on_a_server_that_is_broken(server, waits, images):
    server.answers.append(respond(500, {"error": "CUDA out of memory"}))
    with pytest.raises(InputError, match=r"500 Internal Server Error: .*CUDA out of memory.*tried 3 times\)"):
        number_judge(server.url, retries=2, concurrency=1)(images, LABELS)
    assert len(server.asked) == 3


def test_vlm_without_a_server(waits, images):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=r"no answer: .*refused.* \(tried 2 times\)"):
            number_judge(url, retries=1)(images, LABELS)


def test_vlm_a_slow_server_is_given_up_and_its_other_requests_are_cut_off(server, images):
    """The first image is never answered; the others' requests would take a minute."""
    let_go = threading.Event()

    def answer(server, handler, body):
        let_go.wait(60.0)

    server.answers.append(answer)
    begin = time.monotonic()
    try:
        with pytest.raises(InputError, match=r"no answer within 0.3 s; raise timeout_s"):
            number_judge(server.url, timeout_s=0.3, retries=0, concurrency=6)(images, LABELS)
        assert time.monotonic() - begin < 30.0
    finally:
        let_go.set()


def test_vlm_an_error_ends_the_requests_that_are_under_way(server, images):
    """One of six is refused while the others wait: these would have a minute, and are cut off instead."""
    let_go, hung_up = threading.Event(), []

    def answer(server, handler, body):
        if sent_text(body) == "Is it cat?" and not hung_up:
            while server.busy < 6 and not let_go.wait(0.01):
                pass
            respond(400, b"no such model")(server, handler, body)
        else:
            handler.connection.settimeout(30.0)
            hung_up.append(handler.connection.recv(1))

    server.answers.append(answer)
    prompts = torch.tensor([0, 1, 2, 0, 2, 0])
    try:
        with pytest.raises(InputError, match="400 Bad Request: 'no such model'; want 200"):
            number_judge(server.url, question="Is it {prompt}?", timeout_s=60.0, concurrency=6)(images, prompts)
        deadline = time.monotonic() + 20.0
        while len(hung_up) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert hung_up == [b""] * 5
    finally:
        let_go.set()


# ---------------------------------------------------------------------------------------------------------------------
# Several at a time


def test_vlm_keeps_as_many_requests_under_way_as_it_may_and_their_order(server, images):
    met = threading.Barrier(3)

    def answer(server, handler, body):
        met.wait(timeout=20.0)
        says(str(1 + sent_image(body)[1].mean() / 100))(server, handler, body)

    server.answers.append(answer)
    scored = number_judge(server.url, concurrency=3)(images, LABELS)
    assert server.busiest == 3
    want = 1 + images.mul(255).round().mean(dim=(1, 2, 3)) / 100
    torch.testing.assert_close(scored.total_B, want, rtol=1e-5, atol=0)
    assert want.unique().numel() == 6


OTHER_PROCESS = """
    import sys
    import numpy as np
    from varfast.rewards.building import Building
    from varfast.rewards.vlm import Vlm, VlmReward, _Task

    config = VlmReward(type="vlm", url=sys.argv[1], model="m", question="{prompt}", answer="number", range=[0.0, 9.0],
                       concurrency=4)
    vlm = Vlm(config, Building("reward.mine", None))
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    tasks = [_Task(i, pixels, {"prompt": f"{sys.argv[2]}{i}"}) for i in range(8)]
    print(*vlm._client.each(vlm._judge, tasks))
"""


def test_vlm_two_processes_share_a_server(server):
    """Each has four requests under way, and gets its own answers."""
    met = threading.Barrier(8)

    def answer(server, handler, body):
        met.wait(timeout=60.0)
        says(sent_text(body)[1:])(server, handler, body)

    server.answers.append(answer)
    script = textwrap.dedent(OTHER_PROCESS)
    processes = [
        subprocess.Popen([sys.executable, "-c", script, server.url, name], stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert printed == ["0.0 1.0 2.0 3.0 4.0 5.0 6.0 7.0\n"] * 2
    assert server.busiest == 8


# ---------------------------------------------------------------------------------------------------------------------
# The key


def test_vlm_sends_the_key_and_shows_it_nowhere(server, images, monkeypatch, capfd):
    secret = "sk-Very/Secret+Key=="
    monkeypatch.setenv("JUDGE_KEY", f" {secret}\n")
    server.answers += [says("4"), respond(401, {"error": f"Incorrect API key provided: {secret}"}),
                       respond(302, b"", Location=f"https://elsewhere/?key={secret}"), says(secret),
                       says(secret * 20)]  # fmt: skip
    mine = number_judge(server.url, api_key_env="JUDGE_KEY", retries=0)
    assert mine(images[:1], LABELS[:1]).total_B.item() == 4.0
    errors = []
    for _ in range(4):
        with pytest.raises(InputError) as caught:
            mine(images[:1], LABELS[:1])
        errors.append(str(caught.value))
    assert "Incorrect API key provided: ***" in errors[0]
    assert "the server redirects to 'https://elsewhere/?key=***'" in errors[1]
    assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {secret}"] * 5
    config = VlmReward(type="vlm", url=server.url, model="m", question="?", api_key_env="JUDGE_KEY")
    shown = "".join([*errors, repr(config), config.model_dump_json(), *capfd.readouterr()])
    assert "Very" not in shown
    assert "JUDGE_KEY" in shown
    assert config.reaches_outside() == f"asks {server.url}, with the key that JUDGE_KEY holds"


def test_vlm_without_a_key_sends_none(server, images, monkeypatch):
    server.answers.append(says("4"))
    number_judge(server.url)(images[:1], LABELS[:1])
    assert "Authorization" not in server.headers[0]
    with pytest.raises(InputError, match="reward.mine.api_key_env=NO_SUCH_KEY: this environment variable is not set"):
        number_judge(server.url, api_key_env="NO_SUCH_KEY")
    for bad in ("two words", "a\r\nInjected: header", "schlüssel", "\x7f"):
        monkeypatch.setenv("JUDGE_KEY", bad)
        with pytest.raises(InputError, match="is no key: it has spaces") as caught:
            number_judge(server.url, api_key_env="JUDGE_KEY")
        assert bad not in str(caught.value)
    with pytest.raises(ValueError, match="want the name of an environment variable"):
        number_judge(server.url, api_key_env="sk-key")


# ---------------------------------------------------------------------------------------------------------------------
# In a run


def test_a_run_with_a_judge_that_fails_loses_no_step(server, make_config, monkeypatch, capfd):
    """An unreadable answer leaves a step out, two in a row end the run, and so does a broken server; it goes on."""
    secret = "sk-Very/Secret+Key=="
    monkeypatch.setenv("JUDGE_KEY", secret)
    reward = {"type": "vlm", "url": server.url, "model": "m", "question": "Is it {prompt}?", "answer": "number",
              "range": [0.0, 255.0], "retries": 0, "concurrency": 1, "api_key_env": "JUDGE_KEY"}  # fmt: skip
    config = make_config(run__steps=6, run__max_bad_rollouts=2, log__checkpoint_every=99, eval__samples_per_label=0,
                         reward={"mine": reward})  # fmt: skip

    def well(server, handler, body):
        says(f"{sent_image(body)[1].mean():.3f}")(server, handler, body)

    step = [well] * config.rollout.images
    server.answers += [*step, says("Hm."), *step, says("Hm."), says("Hm.")]
    with pytest.raises(NotFiniteReward, match=r"the answer for image 0 is 'Hm.'; want a number") as caught:
        train(config)
    assert "holds step 3; the same command goes on from there" in "\n".join(caught.value.__notes__)
    assert "step 2 is left out: " in capfd.readouterr().out
    server.answers += [respond(500, f"down: {secret}".encode()), well]
    with pytest.raises(InputError, match=r"500 Internal Server Error: 'down: \*\*\*'") as caught:
        train(config)
    assert "the same command goes on from there" in "\n".join(caught.value.__notes__)
    assert train(config) == 0
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {secret}"}
    written = [path.read_bytes() for path in Path(config.run.dir).rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not any(b"Very" in content for content in written)
    assert any(b"JUDGE_KEY" in content for content in written)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"question": None}, "give question or template"),
        ({"question": [""]}, "question"),
        ({"question": None, "template": "unified_reward", "range": [0.0, 1.0]}, "has its own range"),
        ({"range": [1.0, 5.0]}, "range is of answer: number; a probability of yes has none"),
        ({"scale": True}, "scale is of answer: number"),
        ({"answer": "number"}, "wants the range of its numbers"),
        ({"answer": "number", "range": [5.0, 1.0]}, r"range: got \[5.0, 1.0\]; want the least number"),
        ({"answer": "number", "range": [1.0, 5.0], "pattern": "(a", }, r"'\(a' is no regular expression"),
        ({"answer": "number", "range": [1.0, 5.0], "pattern": r"\d"}, r"has 0 groups; want one"),
        ({"answer": "number", "range": [1.0, 5.0], "pattern": r"(\d)", "json_key": "a"}, "give pattern or json_key"),
        ({"extra": {"messages": []}}, "messages is a key of the reward itself"),
        ({"extra": {"top_p": float("inf")}}, "want finite numbers"),
    ],
)  # fmt: skip
def test_vlm_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        judge("http://127.0.0.1:1", **settings)


def test_the_examples_of_the_docs_are_settings():
    docs = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", docs, re.S) if "type: vlm" in block]
    rewards = [reward for block in blocks for reward in block.values()]
    assert len(rewards) == 4
    for reward in rewards:
        TypeAdapter(RewardConfig).validate_python(reward)
