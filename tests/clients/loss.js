// A producer or a worker of the loss test, with nothing but ioredis; see loss.py for its arguments and its log.
const fs = require("fs");
const Redis = require("ioredis");

const [role, path, addressList, queue, count, name] = process.argv.slice(2);
const addresses = addressList.split(",");
const log = fs.openSync(path, "w");
const write = (line) => fs.writeSync(log, line + "\n");
const micros = () => process.hrtime.bigint() / 1000n;
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

let at = name.length + name.charCodeAt(name.length - 1);
let client = null;

function connect() {
  const [host, port] = addresses[at % addresses.length].split(":");
  const fresh = new Redis({ host, port: Number(port), retryStrategy: null, maxRetriesPerRequest: 0, autoResendUnfulfilledCommands: false });
  fresh.on("error", () => {});
  return fresh;
}

// The reply, an Error that the server sent, or null when it is not known what happened.
async function call(...words) {
  try {
    client = client ?? connect();
    return await client.call(...words);
  } catch (error) {
    await pause(20);
    if (error.name === "ReplyError") return error;
    client?.disconnect();
    client = null;
    at += 1;
    return null;
  }
}

async function produce() {
  for (let number = 0; number < Number(count); number++) {
    const words = ["GOFLOW.ENQUEUE", queue, `${name}:${number}`];
    if (number % 4 === 0) words.push("ID", `${name}-${number}`);
    for (;;) {
      const reply = await call(...words);
      if (typeof reply === "string") {
        write(`E ${micros()} ${reply}`);
        break;
      }
    }
  }
}

async function work() {
  for (;;) {
    const reply = await call("GOFLOW.DEQUEUE", queue, "BLOCK", "2000", "LEASE", "4000", "WORKER", name);
    if (reply === null || reply instanceof Error) continue;
    const job = new Map();
    for (let i = 0; i < reply.length; i += 2) job.set(reply[i], reply[i + 1]);
    const [id, receipt] = [job.get("id"), job.get("receipt")];
    write(`D ${micros()} ${id} ${receipt} ${job.get("lease_until")}`);
    write(`S ${micros()} ${id} ${receipt}`);
    let acked = await call("GOFLOW.ACK", queue, receipt);
    while (typeof acked !== "number") acked = await call("GOFLOW.ACK", queue, receipt);
    write(`A ${micros()} ${id} ${receipt} ${acked}`);
  }
}

(role === "produce" ? produce() : work()).then(() => process.exit(0));
