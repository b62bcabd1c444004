"""The command line, as a person and as a script use it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captionserve_server.gateway.tokens import create_token
from captionserve_server.serving.ready import ReadyReport

from tests.certificates import CertificateFiles, certificate_pem, issued, key_pem
from tests.conftest import DEMO, DEMO_FOLDER
from tests.faults.served import serving

ROOT = Path(__file__).parent.parent.parent
CAPTIONS: dict[str, str] = json.loads((DEMO_FOLDER / "images" / "captions.json").read_text())
IMAGES = [str(DEMO_FOLDER / "images" / name) for name in CAPTIONS]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "captionserve_server.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )


def test_the_bundled_images_are_captioned_right(service: Callable[[str], ReadyReport]) -> None:
    process = run("caption", *IMAGES, "--target", service(DEMO).grpc, "--num-beams", "4")
    assert process.returncode == 0, process.stderr
    for name, caption in CAPTIONS.items():
        assert re.search(rf"{re.escape(name)}: {re.escape(caption)} \(-?\d", process.stdout)


def test_json_is_for_scripts(service: Callable[[str], ReadyReport], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    process = run(
        *("caption", IMAGES[0], str(bad), str(tmp_path / "missing.jpg"), "--json"),
        *("--target", service(DEMO).grpc, "--num-beams", "3", "--num-return-sequences", "2"),
        *("--early-stopping", "never", "--length-penalty", "0.5", "--max-length", "30"),
    )
    assert process.returncode == 5
    good, refused, missing = json.loads(process.stdout)
    assert [set(caption) for caption in good["captions"]] == [
        {
            *("text", "score", "token_ids", "token_logprobs", "token_texts"),
            *("finish_reason", "confidence", "degenerate", "words"),
            *("needs_review", "review_reasons"),
        }
    ] * 2
    assert refused["error"]["reason"] == "UNSUPPORTED_IMAGE_FORMAT"
    assert missing["error"]["reason"] == "UNREADABLE"


def test_without_a_service_captions_are_the_same(
    service: Callable[[str], ReadyReport],
    model_repository: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    arguments = ("caption", *IMAGES, str(bad), "--json", "--num-beams", "3", "--attention")
    arguments = (*arguments, "--grounding", "--min-confidence", "0.999999")
    served = run(*arguments, "--bypass-cache", "--target", service(DEMO).grpc)
    local = run(*arguments, "--local", str(model_repository(DEMO)))
    assert (served.returncode, local.returncode) == (5, 5)
    *expected, expected_problem = json.loads(served.stdout)
    *answers, problem = json.loads(local.stdout)
    assert problem == expected_problem
    for answer, other in zip(answers, expected, strict=True):
        assert _without_numbers(answer) == _without_numbers(other)
        for found, true in zip(answer["captions"], other["captions"], strict=True):
            assert list(found) == list(true)
            for name in ("score", "token_logprobs", "confidence", "token_groundings", "grounding"):
                assert found[name] == pytest.approx(true[name], abs=1e-4), name
            for word, other_word in zip(found["words"], true["words"], strict=True):
                assert word == pytest.approx(other_word, abs=1e-4)
            assert found["review_reasons"] == ["low_confidence"]
            attention = np.array(found["attention"])
            np.testing.assert_allclose(attention, true["attention"], atol=1e-4)


def test_json_tells_of_search_and_stages(
    service: Callable[[str], ReadyReport], model_repository: Callable[[str], Path]
) -> None:
    arguments = ("caption", IMAGES[0], "--json", "--num-beams", "3", "--beams", "--stages")
    for where in (("--target", service(DEMO).grpc), ("--local", str(model_repository(DEMO)))):
        (answer,) = json.loads(run(*arguments, *where).stdout)
        path = answer["beams"]["paths"][0]["continuations"]
        walked = [answer["beams"]["steps"][step][at] for step, at in enumerate(path)]
        assert [each["token_id"] for each in walked] == answer["captions"][0]["token_ids"]
        assert {each["fate"] for each in walked} == {"kept", "finished"}
        assert answer["stages"]["steps"] > 0


def _without_numbers(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what rounding may change."""
    rounded = {"score", "token_logprobs", "confidence", "attention"}
    rounded |= {"token_groundings", "grounding", "words"}
    captions = [
        {name: value for name, value in found.items() if name not in rounded}
        for found in answer["captions"]
    ]
    return {**answer, "captions": captions}


def test_alt_text_is_the_same_with_and_without_a_service(
    service: Callable[[str], ReadyReport], model_repository: Callable[[str], Path]
) -> None:
    arguments = ("caption", *IMAGES, "--num-beams", "4", "--alt-text")
    served = run(*arguments, "--target", service(DEMO).grpc, "--json")
    assert served.returncode == 0, served.stderr
    for answer, caption in zip(json.loads(served.stdout), CAPTIONS.values(), strict=True):
        assert answer["captions"][0]["text"] == caption
        alt_text = answer["alt_text"]
        assert set(alt_text) == {"text", "removed", "hedged", "truncated", "warnings"}
        assert alt_text["text"] == caption[0].upper() + caption[1:]
    local = run(*arguments, "--local", str(model_repository(DEMO)), "--alt-text-chars", "9")
    assert local.returncode == 0, local.stderr
    for line, (name, caption) in zip(local.stdout.splitlines(), CAPTIONS.items(), strict=True):
        image, _, text = line.partition(": ")
        assert image.endswith(name)
        assert 0 < len(text) <= 9
        assert caption.startswith(text.lower())
    assert "penguin.jpg: warning: too short" in local.stderr


def test_over_tls_with_a_certificate_and_a_token(
    model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    files = CertificateFiles(tmp_path)
    token = create_token(files.tokens, "alice")
    pair = issued("a client", files.authority)
    given = {
        "--token-file": (token + "\n").encode(),
        "--tls-certificate": certificate_pem(pair),
        "--tls-key": key_pem(pair),
    }
    for flag, content in given.items():
        (tmp_path / flag).write_bytes(content)

    def as_known(*but: str) -> list[str]:
        known = [(flag, str(tmp_path / flag)) for flag in given if flag not in but]
        return [word for pair in (("--tls-ca", str(files.ca)), *known) for word in pair]

    with serving(
        *(model_repository(DEMO), tmp_path, "--tls-certificate", str(files.certificate)),
        *("--tls-key", str(files.key), "--tls-client-ca", str(files.ca)),
        *("--tokens", str(files.tokens)),
    ) as served:
        target = ("--target", served.report["grpc"])
        call = ("caption", *IMAGES, *target, "--num-beams", "4", "--timeout", "5")
        process = run(*call, *as_known())
        assert process.returncode == 0, process.stderr
        for name, caption in CAPTIONS.items():
            assert f"{name}: {caption} (" in process.stdout
        process = run(*call, *as_known("--token-file"))
        assert process.returncode == 5
        assert process.stderr.count("UNAUTHENTICATED") == len(IMAGES)
        assert run(*call, *as_known("--tls-certificate", "--tls-key")).returncode == 5
        assert run(*call, *as_known("--tls-key")).returncode == 2
        process = run("evaluate", *target, *as_known(), "--scenes", "2", "--json")
        assert process.returncode == 0, process.stderr
        said = served.end()
    assert "identity=alice" in said
    assert token not in said


def test_a_token_is_for_this_machine_or_tls(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("secret")
    call = ("caption", IMAGES[0], "--token-file", str(token_file))
    process = run(*call, "--target", "10.0.0.1:9000")
    assert process.returncode == 2
    assert "it needs TLS" in " ".join(process.stderr.split())
    assert run(*call, "--local", str(tmp_path)).returncode == 2


def test_no_service_is_an_error_in_words() -> None:
    process = run("caption", IMAGES[0], "--target", "127.0.0.1:1", "--timeout", "2")
    assert process.returncode == 5
    assert "UNAVAILABLE" in process.stderr or "DEADLINE_EXCEEDED" in process.stderr
    assert "Traceback" not in process.stderr


def test_wrong_usage_is_exit_code_2() -> None:
    for wrong in (["--alt-text", "--stream"], ["--alt-text-chars", "9"]):
        assert run("caption", IMAGES[0], *wrong).returncode == 2
    assert run("caption", IMAGES[0], "--alt-text", "--alt-text-chars", "0").returncode == 2
    assert run("caption", IMAGES[0], "--early-stopping", "sometimes").returncode == 2
    assert run("export").returncode == 2


def test_export_refuses_in_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    process = run("export", str(tmp_path), "--output", str(tmp_path / "repository"))
    assert process.returncode == 3
    assert "'blip' is not supported" in process.stderr
    assert "Traceback" not in process.stderr


def test_export_reports_json_and_adds_versions(
    model_repository: Callable[[str], Path],
    checkpoint_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(model_repository("two_ends"), repository)
    process = run(
        *("export", str(checkpoint_folder("two_ends")), "--output", str(repository)),
        *("--version", "2", "--precision", "int8", "--json"),
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["version"] == 2
    assert report["precision"] == "int8"
    assert 1e-4 < report["verification"]["logprobs"] < 1.0
    assert report["agreement"]["images"] > 0
    assert sorted(path.name for path in (repository / "captioner").iterdir()) == [
        "1",
        "2",
        "config.pbtxt",
    ]


def test_evaluate_scores_a_running_service(service: Callable[[str], ReadyReport]) -> None:
    process = run("evaluate", "--target", service(DEMO).grpc, "--scenes", "40", "--json")
    assert process.returncode == 0, process.stderr
    reports = json.loads(process.stdout)
    trained = reports["unseen_combinations"]
    assert set(reports) == {"unseen_combinations", "unseen_style"}
    assert trained["scenes"] == 40
    assert trained["object_accuracy"] >= 0.95
    assert trained["exact_captions"] >= 0.9
    assert 0 < trained["bleu_4"] <= 100
    assert 0 < trained["cider_d"] <= 10


SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
WITH_SNIPPETS = [
    str(page.relative_to(ROOT))
    for page in sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
    if SNIPPET.search(page.read_text())
]


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_the_snippets_run(
    page: str,
    service: Callable[[str], ReadyReport],
    model_repository: Callable[[str], Path],
) -> None:
    snippets = SNIPPET.findall((ROOT / page).read_text())
    places = {
        "127.0.0.1:9000": service(DEMO).grpc,
        "model_repository_dir": str(model_repository(DEMO)),
    }
    for snippet in snippets:
        if "captions.example" in snippet:
            compile(snippet, page, "exec")
            continue
        assert any(named in snippet for named in places)
        for named, place in places.items():
            snippet = snippet.replace(named, place)
        process = subprocess.run(
            [sys.executable, "-c", snippet],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=ROOT,
        )
        assert process.returncode == 0, process.stderr
        assert process.stdout.strip()
