"""Bodies of the HTTP API: what a request may hold and what a response holds.

`POST /v1/images` is ours and strict. `POST /v1/images/generations` and `POST /v1/videos` have OpenAI's
fields, so that its client works unchanged; what that API has and this server cannot honour is refused by
`unsupported`, never silently dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

MAX_IMAGES = 10
MAX_SEED = 2**63 - 1
SIZE_PATTERN = r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$"


def _whole(value: object) -> object:
    """JSON has one kind of number, and some clients write `1.0`. Above 2**53 a float may be a neighbour."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
OutputFormat = Literal["png", "jpeg", "webp"]
VideoFormat = Literal["mp4", "webm"]
ResponseFormat = Literal["url", "b64_json"]
Status = Literal["queued", "in_progress", "completed", "failed", "expired"]


class Body(BaseModel):
    """A request body: exact types, no unknown fields; `null` means the same as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return (
            {name: value for name, value in data.items() if value is not None}
            if isinstance(data, dict)
            else data
        )


class SampleRequest(Body):
    """What every route that makes something shares."""

    prompt: Prompt = Field(description="What to draw.", examples=["a red sphere on the left"])
    model: str | None = Field(default=None, description="One of GET /v1/models; the first one if absent.")
    size: str = Field(
        default="auto", pattern=SIZE_PATTERN, description="WIDTHxHEIGHT, or auto for the model's own size."
    )
    seed: Whole | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="The same seed draws the same again. Random if absent, and reported.",
    )
    steps: Whole | None = Field(
        default=None, ge=1, le=64, description="Denoising steps; the model's default if absent."
    )
    max_steps_under_load: Whole | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Consent to at most so many steps while a job may take more than half of its deadline: "
        "sooner, and rather than a refusal. The answer's `steps` says what was done.",
    )


class DrawingRequest(SampleRequest):
    """What both routes that draw images share."""

    n: Whole = Field(default=1, ge=1, le=MAX_IMAGES, description="Images to draw; image i has seed + i.")
    output_format: OutputFormat = "png"
    output_compression: Whole | None = Field(
        default=None, ge=0, le=100, description="Quality of jpeg and webp, 0 to 100."
    )


class ImageRequest(DrawingRequest):
    """`POST /v1/images`."""

    response_format: ResponseFormat = Field(
        default="url", description="b64_json puts the bytes into the answer; the URL is always there."
    )
    wait_s: float | None = Field(
        default=None,
        ge=0,
        description="Answer after this long at most, with the job if it is not done; 0: at once.",
    )


class GenerationsRequest(DrawingRequest):
    """`POST /v1/images/generations`, OpenAI's fields."""

    response_format: ResponseFormat = "b64_json"
    background: Literal["auto", "opaque", "transparent"] = "auto"
    stream: bool = False
    partial_images: Whole = Field(default=0, ge=0, le=3)
    moderation: str | None = Field(default=None, description="Accepted, without effect.")
    quality: str | None = Field(default=None, description="Accepted, without effect; see steps.")
    style: str | None = Field(default=None, description="Accepted, without effect.")
    user: str | None = Field(default=None, description="Accepted, without effect.")

    def unsupported(self) -> tuple[str, str] | None:
        """The first field whose value this server cannot honour, with what it can."""
        if self.stream:
            return "stream", "stream=true is not supported; the only allowed value is false"
        if self.partial_images:
            return "partial_images", "partial_images is not supported; the only allowed value is 0"
        if self.background == "transparent":
            return "background", "background=transparent is not supported; allowed are auto and opaque"
        return None


class VideoRequest(SampleRequest):
    """`POST /v1/videos`, as JSON or as a form; OpenAI's fields, and ours after them."""

    seconds: float | None = Field(
        default=None,
        strict=False,  # OpenAI's client sends a string
        gt=0,
        le=3600,
        description="Length, one of the model's; its first if absent. The time from the first frame to the "
        "last, or that plus the last frame's own: 49 frames at 8 a second are 6 or 6.125.",
    )
    input_reference: Any = Field(default=None, description="Not supported: videos are made from text alone.")
    frames: Whole | None = Field(default=None, ge=1, le=10_000, description="Length in frames, exactly.")
    fps: Whole | None = Field(
        default=None, ge=1, le=240, description="Frames per second; only the model's own is allowed."
    )
    output_format: VideoFormat = Field(default="mp4", description="mp4: H.264; webm: VP9.")

    def unsupported(self) -> tuple[str, str] | None:
        """As `GenerationsRequest.unsupported`."""
        if self.input_reference is not None:
            return "input_reference", "input_reference is not supported; videos are made from text alone"
        return None


class RemixRequest(Body):
    """`POST /v1/videos/{id}/remix`, as JSON or as a form: all but the prompt is taken from that video."""

    prompt: Prompt = Field(description="What to draw instead.", examples=["a blue sphere on the left"])


class ImageData(BaseModel):
    """One finished image."""

    url: str | None = Field(description="Of its bytes; null where they come along as `b64_json`.")
    b64_json: str | None = None
    seed: int = Field(description="Draws exactly this image again with n=1.")
    width: int
    height: int
    content_type: str
    size_bytes: int


class ErrorDetail(BaseModel):
    """What went wrong: `message` for people, `code` for programs."""

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(BaseModel):
    """Every error response."""

    error: ErrorDetail


class JobErrorView(BaseModel):
    """Why a job failed; a cancelled job has code `cancelled`."""

    code: str
    message: str


WARNINGS_HELP = "What of the prompt the model did not hear: unknown words, and what is beyond its last token."
VERSION_HELP = "Content hash of the bundle that draws it, or drew it; null until it has been started."


class ImageJob(BaseModel):
    """A job: the answer to `POST /v1/images` and `GET /v1/images/{id}`, finished or not."""

    id: str
    object: Literal["image"] = "image"
    status: Status
    model: str
    version: str | None = Field(default=None, description=VERSION_HELP)
    created: int = Field(description="Unix time in seconds, like every time here.")
    completed_at: int | None = None
    expires_at: int | None = Field(
        default=None, description="From then on the status is `expired` and the images are gone."
    )
    progress: int = Field(ge=0, le=100)
    queue_position: int | None = Field(default=None, description="Jobs ahead of it, at most; while queued.")
    eta_s: float | None = Field(
        default=None, description="Seconds until it is finished, predicted; null if unknown."
    )
    prompt: str
    n: int
    size: str
    seed: int
    steps: int
    output_format: OutputFormat
    data: list[ImageData] = Field(default_factory=list, description="Images, once completed.")
    warnings: list[str] = Field(default_factory=list, description=WARNINGS_HELP)
    timing_ms: dict[str, float] = Field(
        default_factory=dict, description="queue, batch, encode, denoise, decode, pack, store, total."
    )
    error: JobErrorView | None = None


class VideoJob(BaseModel):
    """A video: OpenAI's fields down to `remixed_from_video_id`, then ours."""

    id: str
    object: Literal["video"] = "video"
    created_at: int = Field(description="Unix time in seconds, like every time here.")
    status: Status = Field(description="A cancelled video is `failed` with error code `cancelled`.")
    model: str
    version: str | None = Field(default=None, description=VERSION_HELP)
    progress: int = Field(
        ge=0, le=100, description="Percent of the denoising steps; decoding and packing come after them."
    )
    seconds: str = Field(description="From the first frame to the last.")
    size: str
    prompt: str
    completed_at: int | None = None
    expires_at: int | None = Field(
        default=None, description="From then on the status is `expired` and the video is gone."
    )
    error: JobErrorView | None = None
    remixed_from_video_id: str | None = None
    url: str | None = Field(default=None, description="Of the file, once completed.")
    size_bytes: int | None = None
    frames: int
    fps: int
    output_format: VideoFormat
    seed: int
    steps: int
    queue_position: int | None = Field(default=None, description="Jobs ahead of it, at most; while queued.")
    eta_s: float | None = Field(
        default=None, description="Seconds until it is finished, predicted; null if unknown."
    )
    warnings: list[str] = Field(default_factory=list, description=WARNINGS_HELP)
    timing_ms: dict[str, float] = Field(
        default_factory=dict, description="queue, batch, encode, denoise, decode, pack, store, total."
    )


class VideoList(BaseModel):
    """`GET /v1/videos`."""

    object: Literal["list"] = "list"
    data: list[VideoJob]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """`DELETE /v1/videos/{id}`."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class InputTokenDetails(BaseModel):
    """OpenAI's split of `input_tokens`."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """OpenAI's usage block. This server does not count tokens, so all are 0."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: InputTokenDetails = InputTokenDetails()


class GenerationsResponse(BaseModel):
    """OpenAI's ImagesResponse, and after `usage` what only this server knows."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str
    usage: Usage = Usage()
    id: str
    model: str
    version: str | None = Field(default=None, description=VERSION_HELP)
    seed: int
    steps: int
    warnings: list[str] = Field(default_factory=list, description=WARNINGS_HELP)
    timing_ms: dict[str, float]


class ModelView(BaseModel):
    """One served model, in OpenAI's shape and with what a client needs to ask it well."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tdm-server"
    kind: Literal["image", "video"]
    version: str = Field(description="Content hash of the bundle.")
    gate: str = Field(
        description="What the quality gate said of it: `passed`, `failed, forced` or `never gated`."
    )
    sizes: list[str]
    seconds: list[str] = Field(description="Lengths of its videos; empty for images.")
    frames: list[int] = Field(description="The same in frames.")
    fps: int | None = Field(description="Frames per second of its videos; null for images.")
    steps: list[int]
    default_steps: int
    max_prompt_chars: int
    examples: list[str] = Field(description="Prompts that show what the model can draw.")
    workers: int = Field(description="Workers that serve it now.")
    backends: list[str]


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelView]


class Health(BaseModel):
    """`GET /healthz`: the process runs."""

    status: Literal["ok"] = "ok"


class ModelReadiness(BaseModel):
    """Who serves one model, and how much waits for it."""

    workers: int
    backends: list[str]
    waiting: int
    running: int
    oldest_age_s: float
    warnings: list[str]


class Readiness(BaseModel):
    """`GET /readyz`: whether a request sent now would be served. With 503, `error` says what is missing."""

    status: Literal["ready", "not_ready"]
    queue: Literal["ok", "unavailable"]
    models: dict[str, ModelReadiness]
    error: ErrorDetail | None = None
