// Server-sent events over fetch: EventSource can neither POST nor send a key.

/** The data of each event of a byte stream. Lines may end in LF, CR LF or CR, and break anywhere between two reads. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return; // an event without its blank line is not complete, so it does not count
      rest += value;
      // A CR at the very end may be half of a CR LF: leave it for the next read.
      const whole = rest.endsWith("\r") ? rest.length - 1 : rest.length;
      const lines = rest.slice(0, whole).split(/\r\n|\n|\r/);
      rest = lines.pop() + rest.slice(whole);
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading lets go of the connection
  }
}
