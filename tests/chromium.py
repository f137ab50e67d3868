"""The system's Chromium, for who looks at pages: CHROMIUM names another."""

import os
import shutil


def executable() -> str | None:
    named = os.environ.get("CHROMIUM", "").strip()
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    return next(filter(None, map(shutil.which, names)), None)
