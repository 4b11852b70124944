"""Images of LeRobot's folders, compressed in Parquet files or in videos, unpacked once into a temporary file."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sb3_dppo.demonstrations.rows import EpisodeRows, Rows, TemporaryImages

# PIL's and FFmpeg's names of grey and colour images, by their number of channels.
CHANNELS = {1: ("L", "gray"), 3: ("RGB", "rgb24"), 4: ("RGBA", "rgba")}
# Images that are read from a Parquet file at once.
BATCH = 64


def images_of_parquet(paths: Sequence[Path], name: str, shape: tuple[int, ...], order: np.ndarray) -> Rows:
    """
    :param paths: The files, one after the other.
    :param name: The column, of structures with ``bytes``, a PNG or JPEG.
    :param shape: Of an image, (H, W, C).
    :param order: Which of all rows, in which order, shape (N,).
    :return: Shape (N, H, W, C).
    :raises ValueError: for files that hold other things, or images of another size.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    images, n = TemporaryImages(shape), 0
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH, columns=[name]):
                    for value in batch.column(name).to_pylist():
                        images.write(_decode(value, shape).data)
                        n += 1
        # PIL raises almost anything for a damaged image.
        except (OSError, ValueError, KeyError, SyntaxError, Image.DecompressionBombError, pa.ArrowException) as error:
            raise ValueError(f"{path}: {name} can't be read as images ({error}).") from error
    return EpisodeRows([images.array(n)], order)


def _decode(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    data = value.get("bytes") if isinstance(value, dict) else None
    if data is None:
        raise ValueError("a row holds no bytes of an image")
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        _check_size(image.width, image.height, shape)
        if image.mode[0] in "IF":
            raise ValueError(f"an image has more than 8 bits per channel (mode {image.mode}), as those of depth have")
        return np.ascontiguousarray(np.asarray(image.convert(CHANNELS[shape[2]][0])).reshape(shape))


def images_of_videos(
    places: Sequence[tuple[Path, float, float]], name: str, shape: tuple[int, ...], lengths: np.ndarray
) -> np.ndarray:
    """
    :param places: For each episode its file, the time at which it begins there, in seconds, and frames per second. A file that
        holds several of them in this order is read once.
    :param name: Name of the video, for errors.
    :param shape: Of an image, (H, W, C).
    :param lengths: Frames of each episode, shape (E,).
    :return: All frames, shape (N, H, W, C).
    :raises ValueError: for files that are missing or damaged, or that lack frames.
    :raises ImportError: without PyAV.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{name} is a video, which needs av: pip install 'sb3-dppo[lerobot]'.") from error
    images, opened, position = TemporaryImages(shape), Path(), 0
    frames: Iterator[tuple[int, np.ndarray]] = iter(())
    for (path, start, fps), length in zip(places, lengths.tolist(), strict=True):
        first = round(start * fps)
        if path != opened or first < position:
            opened, frames = path, _frames(path, fps, shape)
        position = first
        try:
            for number, frame in frames:
                if number > position:
                    break
                if number == position:
                    images.write(np.ascontiguousarray(frame).data)
                    position += 1
                    if position == first + length:
                        break
        except (OSError, ValueError, TypeError, IndexError, av.FFmpegError) as error:
            raise ValueError(f"{path} can't be read as a video of {name} ({error}).") from error
        if position < first + length:
            raise ValueError(f"{path} lacks frame {position}, one of {first} to {first + length - 1} of an episode.")
    return images.array(int(lengths.sum()))


def _frames(path: Path, fps: float, shape: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """The frames of a video and their numbers."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            _check_size(frame.width, frame.height, shape)
            yield round(float(frame.time) * fps), frame.to_ndarray(format=CHANNELS[shape[2]][1]).reshape(shape)


def _check_size(width: int, height: int, shape: tuple[int, ...]) -> None:
    if (height, width) != shape[:2]:
        raise ValueError(f"an image has {height} × {width} pixels, not {shape[0]} × {shape[1]} as meta/info.json says")
