// The whole life of jobs through ioredis or node-redis, with their defaults; prints "done" when every answer was right.
//
//     cycle.js ioredis|redis PORT QUEUE [PROTOCOL]
const assert = require("assert");

const [library, port, queue, protocol] = process.argv.slice(2);

// An object for a map, however the library shows it.
function fields(reply) {
  if (reply === null || typeof reply !== "object") return reply;
  if (reply instanceof Map) return Object.fromEntries(reply);
  if (!Array.isArray(reply)) return { ...reply };
  const pairs = [];
  for (let i = 0; i < reply.length; i += 2) pairs.push([reply[i], reply[i + 1]]);
  return Object.fromEntries(pairs);
}

async function connect() {
  if (library === "ioredis") {
    const Redis = require("ioredis");
    const client = new Redis({ port: Number(port), ...(protocol ? { protocol: Number(protocol) } : {}) });
    return { call: (...words) => client.call(...words), close: () => client.quit() };
  }
  const { createClient } = require("redis");
  const client = createClient({ url: `redis://127.0.0.1:${port}`, ...(protocol ? { RESP: Number(protocol) } : {}) });
  client.on("error", (error) => { throw error; });
  await client.connect();
  return { call: (...words) => client.sendCommand(words.map(String)), close: () => client.close() };
}

async function main() {
  const { call, close } = await connect();
  const take = async (block) => fields(await call("GOFLOW.DEQUEUE", queue, "BLOCK", block));
  let id = await call("GOFLOW.ENQUEUE", queue, "hello", "META", "k", "v");
  let job = await take(60000);
  assert.deepStrictEqual([job.id, job.payload, Number(job.attempt)], [id, "hello", 1]);
  assert.deepStrictEqual(fields(job.meta), { k: "v" });
  assert.strictEqual(await call("GOFLOW.ACK", queue, job.receipt), 1);
  id = await call("GOFLOW.ENQUEUE", queue, "bad", "ATTEMPTS", 2, "BACKOFF", 1);
  job = await take(60000);
  assert.strictEqual(await call("GOFLOW.FAIL", queue, job.receipt, "ERROR", "boom"), "scheduled");
  await assert.rejects(call("GOFLOW.EXTEND", queue, job.receipt, 1000), /^\w*Error: LEASELOST/);
  job = await take(60000);
  assert.deepStrictEqual([job.id, Number(job.attempt)], [id, 2]);
  assert.strictEqual(await call("GOFLOW.FAIL", queue, job.receipt, "ERROR", "boom"), "dead");
  assert.strictEqual(await call("GOFLOW.DLQ", "LEN", queue), 1);
  const [dead] = await call("GOFLOW.DLQ", "LIST", queue);
  assert.strictEqual(fields(dead).error, "boom");
  assert.strictEqual(await call("GOFLOW.DLQ", "RETRY", queue, id), 1);
  job = await take(60000);
  assert.strictEqual(await call("GOFLOW.ACK", queue, job.receipt), 1);
  assert.strictEqual(await take(20), null);
  const ids = await Promise.all(Array.from({ length: 100 }, (_, n) => call("GOFLOW.ENQUEUE", queue, n)));
  assert.strictEqual(new Set(ids).size, 100);
  await close();
  console.log("done");
}

main().catch((error) => { console.error(error); process.exit(1); });
