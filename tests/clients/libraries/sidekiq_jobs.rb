# Sidekiq: `ruby sidekiq_jobs.rb produce PORT FROM TO LOG`; the worker is `sidekiq -r ./sidekiq_jobs.rb` with REDIS_URL.
# A job appends its number to LOG as one line.
require "sidekiq"

class Note
  include Sidekiq::Worker

  def perform(path, number)
    File.write(path, "#{number}\n", mode: "a")
  end
end

if ARGV[0] == "produce"
  Sidekiq.configure_client { |config| config.redis = { url: "redis://127.0.0.1:#{ARGV[1]}/0" } }
  (ARGV[2].to_i...ARGV[3].to_i).each { |number| Note.perform_async(ARGV[4], number) }
end
