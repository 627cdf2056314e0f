// Clients that contend for locks or the slots of semaphores, with nothing but ioredis; see contend.py for arguments and log.
const fs = require("fs");
const Redis = require("ioredis");

const [path, addressList, kind, limit, objects, clients, grants, ttl, name] = process.argv.slice(2);
const addresses = addressList.split(",");
const log = fs.openSync(path, "w");
const micros = () => Number(process.hrtime.bigint() / 1000n);
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

function connect() {
  const [host, port] = addresses[Math.floor(Math.random() * addresses.length)].split(":");
  const fresh = new Redis({ host, port: Number(port), retryStrategy: null, maxRetriesPerRequest: 0, autoResendUnfulfilledCommands: false });
  fresh.on("error", () => {});
  return fresh;
}

async function contend(number) {
  let client = null;
  let had = 0;
  while (had < Number(grants)) {
    const what = `contended-${Math.floor(Math.random() * Number(objects))}`;
    try {
      client = client ?? connect();
      const words = kind === "LOCK" ? [] : [limit];
      const asked = micros();
      const answer = await client.call(`GOFLOW.${kind}`, "ACQUIRE", what, ...words, ttl, "WAIT", 2000);
      const from = micros();
      if (answer === null) continue;
      const [token, fence] = kind === "LOCK" ? answer : [answer, 0];
      await pause(Math.random() > 0.03 ? Math.random() * 2 : Number(ttl) * 1.3);
      const letGo = micros();
      had += 1;
      const surely = Math.min(letGo, asked + Number(ttl) * 1000 - 2000);
      if (surely > from) fs.writeSync(log, `${asked} ${from} ${surely} ${letGo} ${fence} ${what} ${name}-${number}\n`);
      await client.call(`GOFLOW.${kind}`, "RELEASE", what, token);
    } catch {
      client?.disconnect();
      client = null;
      await pause(50);
    }
  }
  client?.disconnect();
}

Promise.all(Array.from({ length: Number(clients) }, (_, number) => contend(number))).then(() => console.log("done"));
