// A person's client: matrix-js-sdk with Rust crypto, as in Element. It reads commands as lines of JSON on
// standard input, and writes a line of JSON for each: {"result": ...} or {"error": "..."}.
import { createInterface } from "node:readline";
import * as sdk from "matrix-js-sdk";
import { logger } from "matrix-js-sdk/lib/logger.js";

logger.disableAll?.();
for (const name of ["debug", "info", "log", "warn", "error", "trace"]) console[name] = () => {};

const { MATRIX_URL, MATRIX_USER, MATRIX_TOKEN, MATRIX_DEVICE } = process.env;
const client = sdk.createClient({
  baseUrl: MATRIX_URL,
  userId: MATRIX_USER,
  accessToken: MATRIX_TOKEN,
  deviceId: MATRIX_DEVICE,
});

async function until(what, find, seconds = 60) {
  const end = Date.now() + seconds * 1000;
  for (;;) {
    const found = await find();
    if (found) return found;
    if (Date.now() > end) throw new Error(`Waited too long for ${what}.`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

// All events of a room, those of threads too.
function eventsOf(room) {
  const threads = room.getThreads().flatMap((thread) => thread.events);
  return [...new Map([...room.getLiveTimeline().getEvents(), ...threads].map((e) => [e.getId(), e])).values()];
}

const commands = {
  async start() {
    await client.initRustCrypto({ useIndexedDB: false });
    await client.startClient({ threadSupport: true, initialSyncLimit: 50 });
    await until("the first sync", () => client.isInitialSyncComplete());
    return client.getCrypto().getVersion();
  },
  async create({ invite, name }) {
    const { room_id } = await client.createRoom({
      preset: "private_chat",
      name,
      invite: [invite],
      initial_state: [
        { type: "m.room.encryption", state_key: "", content: { algorithm: "m.megolm.v1.aes-sha2" } },
      ],
    });
    await until("the bot to join", () => client.getRoom(room_id)?.getMember(invite)?.membership === "join");
    await until("encryption", () => client.getCrypto().isEncryptionEnabledInRoom(room_id));
    return room_id;
  },
  async send({ room, thread = null, content }) {
    return (await client.sendMessage(room, thread, content)).event_id;
  },
  async redact({ room, event }) {
    return (await client.redactEvent(room, event)).event_id;
  },
  // The answer to a message, as the client shows it after all edits. `ends`: what it ends with.
  async answer({ room, event, ends = "" }) {
    const found = await until(`the answer to ${event}`, async () => {
      for (const each of eventsOf(client.getRoom(room))) {
        await client.decryptEventIfNeeded(each);
        const content = each.getContent();
        const relation = each.getWireContent()["m.relates_to"] ?? {};
        const isAnswer = relation["m.in_reply_to"]?.event_id === event && each.getSender() !== MATRIX_USER;
        if (isAnswer && content.body?.endsWith(ends)) return each;
      }
      return null;
    });
    return {
      id: found.getId(),
      encrypted: found.isEncrypted() && !found.isDecryptionFailure(),
      thread: found.threadRootId ?? null,
      edited: found.replacingEventId() !== undefined,
      content: found.getContent(),
    };
  },
  async stop() {
    client.stopClient();
    return true;
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...details } = JSON.parse(line);
  let answer;
  try {
    answer = { result: await commands[command](details) };
  } catch (error) {
    answer = { error: String(error?.stack ?? error) };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
  if (command === "stop") process.exit(0);
}
