"""Images of the HTML reports."""

import base64
import io

import numpy as np
from PIL import Image


def jpeg(image: np.ndarray, max_side: int, quality: int) -> bytes:
    """Encode an image, uint8 (H, W, 3), as a JPEG file; it is shrunk to `max_side` pixels a side where it has more."""
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((max_side, max_side))
    file = io.BytesIO()
    thumbnail.save(file, "JPEG", quality=quality)
    return file.getvalue()


def data_uri(content: bytes, image_format: str) -> str:
    """Encode an image file as a data URI; `image_format` is png, jpeg or svg+xml."""
    return f"data:image/{image_format};base64,{base64.b64encode(content).decode()}"
