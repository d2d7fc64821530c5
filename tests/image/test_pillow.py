"""Pillow's settings of the process: changed while any thread is inside, and then as they were."""

import warnings

from PIL import Image

from meteor.image.pillow import pillow_settings


def test_two_threads_that_overlap_leave_the_settings_as_they_were() -> None:
    # In the order in which two threads can meet: the first to enter is the first to leave.
    filters, limit = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    first, second = pillow_settings.tamed(10), pillow_settings.tamed(1000)
    first.__enter__()
    assert Image.MAX_IMAGE_PIXELS == 10
    second.__enter__()
    assert Image.MAX_IMAGE_PIXELS == 1000
    first.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert warnings.filters != filters
    second.__exit__(None, None, None)
    assert warnings.filters == filters
    assert limit == Image.MAX_IMAGE_PIXELS
