// Asking the page's own server.

export class Failed extends Error {
  constructor(error) {
    super(error.message);
    this.error = error;
  }
}

const lost = () => new Failed({ reason: "NO_ANSWER", message: "the page's server does not answer; is it still running?" });

async function answered(request) {
  let response;
  try {
    response = await request;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw lost();
  }
  if (response.ok) return response;
  let error;
  try {
    ({ error } = await response.json());
  } catch {
    error = { reason: `HTTP ${response.status}`, message: "the page's server did not answer as it should" };
  }
  throw new Failed(error);
}

export async function get(path) {
  return (await answered(fetch(path))).json();
}

export async function getBlob(path) {
  return (await answered(fetch(path))).blob();
}

export async function post(path, value) {
  const body = new Blob([JSON.stringify(value), "\n"]);
  return (await answered(fetch(path, { method: "POST", body, headers: { "Content-Type": "application/octet-stream" } }))).json();
}

// Yields {text, beam_steps}, at last {result, seconds} or {error}.
export async function* captions(asked, image, signal) {
  const response = await answered(fetch("/api/caption", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/octet-stream" },
    body: new Blob([JSON.stringify(asked), "\n", image]),
  }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw lost();
    }
    if (part.done) break;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      ended ||= Boolean(event.result || event.error);
      yield event;
    }
  }
  if (!ended) throw lost();
}
