// A worker that knows BRPOP alone, with nothing but ioredis; see list.py for its arguments and what it writes.
const fs = require("fs");
const Redis = require("ioredis");

const [address, list, log, workMs] = process.argv.slice(2);
const [host, port] = address.split(":");
const server = new Redis({ host, port: Number(port) });
const done = fs.openSync(log, "a");

async function work() {
  for (;;) {
    const popped = await server.brpop(list, 1);
    if (popped === null) continue;
    await new Promise((worked) => setTimeout(worked, Number(workMs ?? 2)));
    fs.writeSync(done, popped[1] + "\n");
  }
}

work();
