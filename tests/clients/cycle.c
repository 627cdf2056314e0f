/* The whole life of jobs through hiredis; prints "done" when every answer was right.
 *
 *     cycle PORT QUEUE [3]
 *
 * The third argument asks for RESP3, which this library knows from its version 1.0 on. */
#include <hiredis/hiredis.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static redisContext *context;

static redisReply *call(const char *line) {
    redisReply *reply = redisCommand(context, line);
    if (!reply) {
        fprintf(stderr, "%s: %s\n", line, context->errstr);
        exit(1);
    }
    return reply;
}

static void expect(int holds, const char *line, redisReply *reply) {
    if (!holds) {
        fprintf(stderr, "%s: type %d, %lld, %s\n", line, reply->type, reply->integer, reply->str ? reply->str : "");
        exit(1);
    }
}

static void expect_integer(const char *line, long long number) {
    redisReply *reply = call(line);
    expect(reply->type == REDIS_REPLY_INTEGER && reply->integer == number, line, reply);
    freeReplyObject(reply);
}

static void expect_text(const char *line, const char *text) {
    redisReply *reply = call(line);
    expect(reply->str && strncmp(reply->str, text, strlen(text)) == 0, line, reply);
    freeReplyObject(reply);
}

/* Takes a job and leaves its receipt, which stands at the same place in both protocols. */
static void take(const char *queue, const char *payload, char *receipt) {
    char line[256];
    snprintf(line, sizeof line, "GOFLOW.DEQUEUE %s BLOCK 60000", queue);
    redisReply *job = call(line);
    /* A flat list or a map: this library shows both as elements. */
    expect(job->elements == 24, line, job);
    expect(strcmp(job->element[2]->str, "receipt") == 0, "receipt", job->element[2]);
    expect(strcmp(job->element[5]->str, payload) == 0, "payload", job->element[5]);
    snprintf(receipt, 128, "%s", job->element[3]->str);
    freeReplyObject(job);
}

int main(int argc, char **argv) {
    const char *queue = argv[2];
    char line[512], receipt[128];
    context = redisConnect("127.0.0.1", atoi(argv[1]));
    if (!context || context->err) return 1;
    if (argc > 3 && HIREDIS_MAJOR > 0) freeReplyObject(call("HELLO 3"));
    freeReplyObject(redisCommand(context, "GOFLOW.ENQUEUE %s hello", queue));
    take(queue, "hello", receipt);
    snprintf(line, sizeof line, "GOFLOW.ACK %s %s", queue, receipt);
    expect_integer(line, 1);
    freeReplyObject(redisCommand(context, "GOFLOW.ENQUEUE %s bad ATTEMPTS 2 BACKOFF 1 ID mine-%s", queue, queue));
    take(queue, "bad", receipt);
    snprintf(line, sizeof line, "GOFLOW.FAIL %s %s ERROR boom", queue, receipt);
    expect_text(line, "scheduled");
    snprintf(line, sizeof line, "GOFLOW.EXTEND %s %s 1000", queue, receipt);
    expect_text(line, "LEASELOST");
    take(queue, "bad", receipt);
    snprintf(line, sizeof line, "GOFLOW.FAIL %s %s ERROR boom", queue, receipt);
    expect_text(line, "dead");
    snprintf(line, sizeof line, "GOFLOW.DLQ LEN %s", queue);
    expect_integer(line, 1);
    snprintf(line, sizeof line, "GOFLOW.DLQ RETRY %s mine-%s", queue, queue);
    expect_integer(line, 1);
    take(queue, "bad", receipt);
    snprintf(line, sizeof line, "GOFLOW.ACK %s %s", queue, receipt);
    expect_integer(line, 1);
    snprintf(line, sizeof line, "GOFLOW.DEQUEUE %s", queue);
    redisReply *nothing = call(line);
    expect(nothing->type == REDIS_REPLY_NIL, line, nothing);
    freeReplyObject(nothing);
    redisFree(context);
    puts("done");
    return 0;
}
