"""Takes the picture of the server's page for docs/serving.md, with Debian's Chromium.

Example:
  perceiver-ar serve --model=DIR --port=8000 &
  python tools/screenshot_page.py --address=http://127.0.0.1:8000 --output=docs/serving.png
"""

import shutil

from playwright.sync_api import sync_playwright

from perceiver_ar_jax.command_line import Parser, run_script


def main() -> int:
    parser = Parser(__doc__)
    parser.add("--address", "of the server", required=True)
    parser.add("--output", "the PNG file", required=True)
    parser.add("--prompt", "to continue", default="The following example shows how")
    parser.add("--temperature", "of sampling", default="0.5")
    parser.add("--dark", "take the dark page", action="store_true")
    parser.add("--tokens", "to wait for", type=int, default=110)
    arguments = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        raise ValueError("there is no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            viewport={"width": 900, "height": 770},
            color_scheme="dark" if arguments.dark else "light",
        )
        page.set_default_timeout(600_000)
        page.goto(arguments.address)
        page.fill("#prompt", arguments.prompt)
        page.fill("#max_tokens", str(arguments.tokens))
        page.fill("#temperature", arguments.temperature)
        page.click("#go")
        page.wait_for_selector("#go:enabled")
        page.focus("#text")
        for _ in range(arguments.tokens // 3):
            page.keyboard.press("ArrowLeft")
        page.screenshot(path=arguments.output)
        browser.close()
    return 0


if __name__ == "__main__":
    run_script("screenshot_page.py", main)
