// BullMQ: `bullmq_jobs.js produce PORT FROM TO LOG`, or `bullmq_jobs.js work PORT`. The environment's KEYPREFIX is its `prefix`.
// A job appends its number to its log as one line.
const fs = require("fs");
const { Queue, Worker } = require("bullmq");

const [role, port, from, to, log] = process.argv.slice(2);
const options = { connection: { host: "127.0.0.1", port: Number(port) }, prefix: process.env.KEYPREFIX ?? "bull" };

async function produce() {
  const queue = new Queue("main", options);
  for (let number = Number(from); number < Number(to); number++) await queue.add("note", { log, number });
  await queue.close();
}

function work() {
  new Worker("main", async (job) => fs.appendFileSync(job.data.log, `${job.data.number}\n`), { ...options, concurrency: 4 });
}

role === "produce" ? produce() : work();
