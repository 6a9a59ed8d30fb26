// Server-sent events of a response. EventSource cannot send an API key, fetch can.

const LONGEST = 8 << 20;

/** Yields {event, data} as they arrive. Throws where an event does not end. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held = (held + value).replaceAll("\r\n", "\n");
      for (let end = held.indexOf("\n\n"); end >= 0; end = held.indexOf("\n\n")) {
        const found = parsed(held.slice(0, end));
        held = held.slice(end + 2);
        if (found) yield found;
      }
      if (held.length > LONGEST) throw new Error("the server sent an event without an end");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    else if (line.startsWith("event:")) event = line.slice(6).trim();
  }
  return data.length ? { event, data: data.join("\n") } : null;
}
