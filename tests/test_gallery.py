"""The finished report that comes with the repository: it opens from a clone, by itself."""

from pathlib import Path

from browsers import CHROMIUM, needs_chromium
from conftest import ROOT

PAGE = ROOT / "docs" / "gallery" / "index.html"


@needs_chromium
def test_the_report_on_photographs_opens_without_a_server_and_shows_its_latents(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    assert PAGE.stat().st_size < 6_000_000
    alone = tmp_path / "sent.html"
    alone.write_bytes(PAGE.read_bytes())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, said, asked = browser.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{alone.as_uri()}#latent=patches-s0/928")
        page.wait_for_selector("#latents-detail h3")
        shown = page.locator("#latents-detail").inner_text()
        assert "Latent 928 of patches-s0" in shown and shown.count("Pink-Lady") > 10
        assert page.locator("#latents-detail canvas.heat").count() > 10, "heat on patches"
        assert page.locator("#latents-detail .absent").count() == 0, "no picture is missing"
        browser.close()
    assert said == [] and not any(url.startswith("http") for url in asked)
