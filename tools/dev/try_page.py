"""Looks at /ui/index.html of a running server in headless Chromium: screenshots, console, width, sorting, axe-core.

    pip install playwright axe-playwright-python        # Chromium of the system is used; nothing else is fetched
    python tools/dev/try_page.py http://localhost:8080 --out shots/

Exit status 1 if axe-core finds a violation, the page is wider than the screen, or the console has an error. Look at the
pictures: nobody else does. Not part of the tests, as it needs a browser.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

SIZES = ((1280, 900), (390, 844))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--out", type=Path, default=Path("shots"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-not-found]
    from playwright.sync_api import sync_playwright  # type: ignore[import-not-found]

    args.out.mkdir(parents=True, exist_ok=True)
    address = f"{args.url.rstrip('/')}/ui/index.html"
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for width, height in SIZES:
                name = f"{scheme}-{width}"
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                page = context.new_page()
                page.on("pageerror", lambda error, name=name: problems.append(f"{name}: {error}"))
                page.on(
                    "console",
                    lambda message, name=name: (
                        problems.append(f"{name}: {message.text}") if message.type == "error" else None
                    ),
                )
                began = time.monotonic()
                page.goto(address)
                page.wait_for_selector("th button")
                ready = time.monotonic() - began
                page.wait_for_timeout(500)
                page.screenshot(path=args.out / f"{name}.png")
                page.screenshot(path=args.out / f"{name}-whole.png", full_page=True)
                if page.evaluate("document.documentElement.scrollWidth") > width:
                    problems.append(f"{name}: wider than the screen")
                began = time.monotonic()
                page.click("#volumes th:nth-child(4) button")
                sorted_s = time.monotonic() - began
                context.close()
                # axe-core is put into the page, which the page's own policy rightly forbids
                context = browser.new_context(
                    viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True
                )
                page = context.new_page()
                page.goto(address)
                page.wait_for_selector("th button")
                result = Axe().run(page)
                for violation in result.response["violations"]:
                    problems.append(f"{name}: {violation['id']}: {violation['nodes'][0]['html'][:150]}")
                context.close()
                print(f"{name}: live after {ready:.2f} s, sorted in {sorted_s:.2f} s")
        browser.close()
    print("\n".join(problems) or "no problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
