"""Hook of mkdocs: the page of results is part of the site as soon as the study has written it."""
import os
from typing import Any


def on_config(config: Any) -> Any:
    """Leave results.md out of the navigation where it does not exist yet."""
    if not os.path.exists(os.path.join(config.docs_dir, 'results.md')):
        for section in config.nav:
            for title, pages in section.items():
                if isinstance(pages, list):
                    section[title] = [page for page in pages if 'results.md' not in page.values()]
    return config
